"""Log output of a program that uses us as a library and has not set any up: warnings, through the standard library.

structlog's own default prints everything on stdout, which belongs to that program.
"""

import structlog


def log_like_a_library() -> None:
    """Leave a program's own structlog configuration alone; without one, hand events to `logging` under our names."""
    if structlog.is_configured():
        return
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            structlog.stdlib.add_logger_name,
            structlog.processors.KeyValueRenderer(key_order=["event"]),
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
