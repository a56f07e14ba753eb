"""How log events leave the process: structlog's own and those of hivemind, grpc and uvicorn, in one format on stderr.

stdout belongs to what a command answers.
"""

import logging
import os
import sys

import structlog

from swarmoe.settings import OutputSettings

_LOUD = {
    "hivemind": logging.ERROR,
    "grpc": logging.ERROR,
    "asyncio": logging.WARNING,
    "uvicorn": logging.WARNING,
    "torch": logging.WARNING,
}
"""Libraries that say more than an operator can use, and from which level on they are heard."""


def start_logging(settings: OutputSettings) -> None:
    """Set the process's log output; call once, before anything logs."""
    # Read by hivemind and grpc when they are imported, in this process and in those it starts.
    os.environ.setdefault("HIVEMIND_LOGLEVEL", "ERROR")
    os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # what fails reaches us as a status; we say it once
    level = getattr(logging, settings.log_level.upper())
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso" if settings.log_format == "json" else "%H:%M:%S", utc=False),
    ]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.stdlib.LoggerFactory(),
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *_renderers(settings.log_format)],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(level)
    for name, least in _LOUD.items():
        logging.getLogger(name).setLevel(max(least, level))


def _renderers(log_format: str) -> list[structlog.typing.Processor]:
    if log_format == "json":
        return [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    plain = structlog.dev.plain_traceback  # the default prints every frame's locals where rich is installed
    return [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), pad_event_to=32, exception_formatter=plain)]
