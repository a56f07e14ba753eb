"""The `swarmoe` command: which commands there are, and how each ends.

Nothing here imports torch or hivemind: `--help` is for people in a hurry.
"""

import sys
import traceback
from pathlib import Path
from typing import Annotated

import typer
from typer.exceptions import TyperException

from coordinator.settings import CoordinatorSettings, StatusSettings
from peer.errors import SwarmError
from peer.settings import DoctorSettings, LocalModel, PeerSettings
from swarmoe.command_line import CONFIG_OPTION, JSON_OPTION, SET_OPTION, Command, Invocation, add, gather
from swarmoe.commands import config, coordinator, doctor, generate, local, peer, status, train, version
from swarmoe.commands.unbuilt import unbuilt
from swarmoe.exit_codes import ExitCode, exit_code_of
from swarmoe.log_format import start_logging
from swarmoe.settings import LocalSettings
from trainer.settings import GenerateSettings, TrainSettings

COMMANDS = [
    Command("local", local.start, LocalSettings, sets_run=True),
    Command("coordinator", coordinator.start, CoordinatorSettings, sets_run=True),
    Command("peer", peer.start, PeerSettings),
    Command("train", train.start, TrainSettings),
    Command("status", status.start, StatusSettings, answers=True),
    Command("generate", generate.start, GenerateSettings, answers=True),
    Command("doctor", doctor.start, DoctorSettings, answers=True),
    Command("version", version.start, LocalModel, answers=True),
    Command("checkpoint", unbuilt("checkpoint", "Gather the swarm into one checkpoint"), LocalModel),
    Command("relay", unbuilt("relay", "Carry calls to peers behind routers"), LocalModel),
    Command("token", unbuilt("token", "Let somebody into a closed run"), LocalModel),
]


def new_app(commands: list[Command]) -> typer.Typer:
    """The command line over these commands, and `config show` about them."""
    app = typer.Typer(
        name="swarmoe",
        help="Train one Mixture-of-Experts model together, on GPUs that people already own.",
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )
    for command in commands:
        add(app, command, commands, start_logging)
    group = typer.Typer(help="Show what a command would run with.")
    app.add_typer(group, name="config")

    @group.command("show")
    def config_show(  # pyright: ignore[reportUnusedFunction]
        command: Annotated[str, typer.Argument(metavar="COMMAND", help="Whose settings.")] = "local",
        *,
        file: Annotated[Path | None, CONFIG_OPTION] = None,
        sets: Annotated[list[str] | None, SET_OPTION] = None,
        presets: Annotated[bool, typer.Option("--presets", help="List run presets and routers instead.")] = False,
        json: Annotated[bool, JSON_OPTION] = False,
    ) -> int:
        """Print every value COMMAND would run with, and where it comes from."""
        if presets:
            return config.show_presets(as_json=json)
        shown = config.find(commands, command)
        given = gather(shown, commands, config=file, sets=sets or [], flags={})
        return config.show(shown, Invocation(given, json))

    return app


app = new_app(COMMANDS)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code; errors become one line on stderr."""
    try:
        return int(app(arguments or ["--help"], prog_name="swarmoe", standalone_mode=False) or 0)
    except SwarmError as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code_of(error)
    except TyperException as error:
        print(f"error: {error.format_message()}", file=sys.stderr)
        return ExitCode.USAGE
    except Exception:  # the top of main
        traceback.print_exc()
        print("error: this is a bug; please report it with the lines above", file=sys.stderr)
        return ExitCode.BUG


def main() -> None:
    """The console script."""
    sys.exit(run(sys.argv[1:]))
