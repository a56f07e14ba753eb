"""`swarmoe config show`"""

import json
from pathlib import Path
from typing import Any

from coordinator.settings import CoordinatorSettings
from peer.errors import BadConfiguration
from peer.manifest import RunManifest
from swarmoe.command_line import Command, Invocation
from swarmoe.configuration import Setting, explain
from swarmoe.run_presets import preset_names, run_manifest
from swarmoe.settings import LocalSettings, OutputSettings


def show(command: Command, invocation: Invocation) -> int:
    """Print every value that `command` would run with, and where it comes from."""
    rows = _rows(command, invocation)
    if invocation.json:
        settings = [{"name": row.name, "value": row.value, "source": row.source} for row in rows]
        print(json.dumps({"command": command.name, "settings": settings}))
    else:
        _print_table(("setting", "value", "from"), [(row.name, _shown(row.value), row.source) for row in rows])
    return 0


def _rows(command: Command, invocation: Invocation) -> list[Setting]:
    settings = invocation.settings(command.settings)
    rows = [*explain(settings, invocation.given), *explain(invocation.settings(OutputSettings), invocation.given)]
    if not isinstance(settings, (LocalSettings, CoordinatorSettings)):
        return rows
    file: Path | None = getattr(settings, "run", None)
    manifest, given = run_manifest(invocation.given, preset=settings.preset, file=file)
    shared = {row.name for row in rows}  # local's seed and steps are the run's
    return rows + [row for row in explain(manifest, given) if row.name not in shared]


def show_presets(*, as_json: bool) -> int:
    """Print the runs that ship, and the routers they can be given."""
    from trainer.routing.presets import presets  # torch takes seconds to import

    routers = sorted(presets())
    runs: dict[str, RunManifest] = {name: run_manifest({}, preset=name)[0] for name in preset_names()}
    if as_json:
        print(
            json.dumps(
                {"presets": {name: run.model_dump(mode="json") for name, run in runs.items()}, "routers": routers}
            )
        )
        return 0
    _print_table(
        ("preset", "experts", "dim", "router", "steps"),
        [
            (name, f"{run.moe_layers} x {run.experts_per_layer}", str(run.model.dim), run.router.preset, str(run.steps))
            for name, run in runs.items()
        ],
    )
    print(f"\nrouters, for --set router.preset=NAME: {', '.join(routers)}")
    return 0


def find(commands: list[Command], name: str) -> Command:
    """The command of that name. Raises BadConfiguration."""
    for command in commands:
        if command.name == name:
            return command
    raise BadConfiguration(
        f"config show: there is no command {name!r}; there are: {', '.join(c.name for c in commands)}"
    )


def _shown(value: Any) -> str:
    return "none" if value is None else json.dumps(value) if isinstance(value, (bool, list)) else str(value)


def _print_table(columns: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
    for row in (columns, *rows):
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
