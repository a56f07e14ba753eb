"""A command's flags are the fields of its settings models: type, default, unit and help are declared there, once.

Knows how flags, environment and files become configuration, and no particular command.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from peer.manifest import RunManifest
from swarmoe.configuration import (
    Layer,
    Model,
    assignments_layer,
    build,
    environment_layer,
    fields,
    flags_layer,
    leaves,
    merge,
)
from swarmoe.run_presets import file_layer
from swarmoe.settings import OutputSettings

CONFIG_OPTION = typer.Option("--config", metavar="FILE.toml", help="Settings from a file.", show_default=False)
SET_OPTION = typer.Option(
    "--set", metavar="NAME=VALUE", help="Any setting by its dotted name; repeatable.", show_default=False
)
JSON_OPTION = typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")


@dataclass(frozen=True)
class Invocation:
    """One start of a command: everything that was given, with its sources."""

    given: Layer
    json: bool

    def settings(self, model: type[Model]) -> Model:
        """The command's validated settings. Raises BadConfiguration."""
        return build(model, self.given)


@dataclass(frozen=True)
class Command:
    """What the command line needs to know of a command. Its docstring is its help."""

    name: str
    start: Callable[[Invocation], int]
    settings: type[BaseModel]
    sets_run: bool = False
    """`--set` also reaches the run's manifest."""
    answers: bool = False
    """It takes `--json`."""

    def models(self) -> list[type[BaseModel]]:
        """Every model whose fields this command can be given."""
        return [self.settings, OutputSettings, *([RunManifest] if self.sets_run else [])]


def gather(
    command: Command, commands: Sequence[Command], *, config: Path | None, sets: Sequence[str], flags: dict[str, Any]
) -> Layer:
    """File < environment < `--set` and flags. Raises BadConfiguration."""
    layers = [
        {} if config is None else file_layer(config),
        environment_layer(os.environ),
        assignments_layer(sets),
        flags_layer(flags),
    ]
    elsewhere = {name for other in commands for model in other.models() for name in leaves(model)}
    return merge(command.models(), layers, elsewhere=elsewhere)


def add(
    app: typer.Typer, command: Command, commands: Sequence[Command], ready: Callable[[OutputSettings], None]
) -> None:
    """Give `app` the command; `ready` is called with its output settings just before it starts."""

    def callback(*, config: Path | None, sets: list[str] | None, json: bool = False, **flags: Any) -> int:
        given = gather(command, commands, config=config, sets=sets or [], flags=flags)
        ready(build(OutputSettings, given))
        return command.start(Invocation(given, json))

    parameters = [
        _keyword("config", Annotated[Path | None, CONFIG_OPTION], None),
        _keyword("sets", Annotated[list[str] | None, SET_OPTION], None),
        *([_keyword("json", Annotated[bool, JSON_OPTION], False)] if command.answers else []),
    ]
    flags = [
        _keyword(name, _flag(name, field), None)
        for model in (command.settings, OutputSettings)
        for name, field in fields(model)
    ]
    # typer reads the flags off the signature.
    callback.__signature__ = Signature([*flags, *parameters], return_annotation=int)  # pyright: ignore[reportFunctionMemberAccess]
    callback.__annotations__ = {p.name: p.annotation for p in [*flags, *parameters]}
    app.command(command.name, help=command.start.__doc__)(callback)


def _flag(name: str, field: FieldInfo) -> Any:
    """The annotation from which typer makes the flag. Values stay text: the model validates them."""
    flag = f"--{name.removesuffix('_s').replace('_', '-')}"
    default = "required" if field.is_required() else f"default: {_shown(field.default)}"
    help_text = f"{field.description} [{default}]"
    if field.annotation is bool:
        switch = typer.Option(f"{flag}/--no-{flag[2:]}", help=help_text, show_default=False)
        return Annotated[bool | None, switch]
    choices = getattr(field.annotation, "__args__", ()) if field.title is None else ()
    metavar = field.title or "|".join(map(str, choices))
    option = typer.Option(flag, metavar=metavar, help=help_text, show_default=False)
    is_list = getattr(field.annotation, "__origin__", None) is tuple
    return Annotated[list[str] | None if is_list else str | None, option]


def _shown(default: Any) -> str:
    if default in (None, ()):
        return "none"
    return {True: "on", False: "off"}[default] if isinstance(default, bool) else str(default).strip()


def _keyword(name: str, annotation: Any, default: Any) -> Parameter:
    return Parameter(name, Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
