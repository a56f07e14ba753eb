"""Where a value comes from: default < run preset < file < environment < flag. Pure: text in, validated models out.

A layer is what one source says, as dotted names. `merge` puts layers over each other and refuses names nobody knows;
`build` makes one frozen model of what was merged. Knows no particular command, reads no file and no environment.
"""

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from peer.errors import BadConfiguration

ENVIRONMENT_PREFIX = "SWARMOE_"

Model = TypeVar("Model", bound=BaseModel)


@dataclass(frozen=True)
class Given:
    """A value somebody gave, still unvalidated. Text is read by the type of the field it lands in."""

    value: Any
    source: str


@dataclass(frozen=True)
class Setting:
    """A value in force."""

    name: str
    value: Any
    source: str


Layer = Mapping[str, Given]


def fields(model: type[BaseModel]) -> list[tuple[str, FieldInfo]]:
    """A model's own first, then what it shares with others."""
    return sorted(model.model_fields.items(), key=lambda item: item[0] not in model.__annotations__)


def leaves(model: type[BaseModel], prefix: str = "") -> dict[str, FieldInfo]:
    """Every setting of a model and of the models inside it, by dotted name."""
    found: dict[str, FieldInfo] = {}
    for name, field in fields(model):
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            found |= leaves(inner, f"{prefix}{name}.")
        else:
            found[prefix + name] = field
    return found


def tree_layer(tree: Mapping[str, Any], source: str, prefix: str = "") -> Layer:
    """What a TOML file says."""
    layer: dict[str, Given] = {}
    for name, value in tree.items():
        if isinstance(value, Mapping):
            layer |= tree_layer(value, source, f"{prefix}{name}.")
        else:
            layer[prefix + name] = Given(value, source)
    return layer


def environment_layer(environ: Mapping[str, str]) -> Layer:
    """`SWARMOE_ROUTER__PRESET=mixtral` is `router.preset`. Variables without the prefix are none of ours."""
    return {
        variable.removeprefix(ENVIRONMENT_PREFIX).lower().replace("__", "."): Given(text, variable)
        for variable, text in environ.items()
        if variable.startswith(ENVIRONMENT_PREFIX)
    }


def assignments_layer(assignments: Iterable[str]) -> Layer:
    """`--set router.preset=mixtral`, as often as wanted."""
    layer: dict[str, Given] = {}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not (name and equals):
            raise BadConfiguration(
                f"--set {assignment}: write --set NAME=VALUE, for example --set router.preset=mixtral"
            )
        layer[name] = Given(text, f"--set {name}")
    return layer


def flags_layer(flags: Mapping[str, Any]) -> Layer:
    """What was given as flags of its own; None and empty mean not given."""
    return {
        name: Given(value, f"--{name.removesuffix('_s').replace('_', '-')}")
        for name, value in flags.items()
        if value is not None and value != []
    }


def merge(models: Sequence[type[BaseModel]], layers: Sequence[Layer], *, elsewhere: Iterable[str] = ()) -> Layer:
    """Later layers win. Raises BadConfiguration for a name that no model has, with the nearest one that exists.

    Names in `elsewhere` belong to other commands: an environment may be shared, so there they are passed over.
    """
    known = {name for model in models for name in leaves(model)}
    foreign = set(elsewhere)
    merged: dict[str, Given] = {}
    for layer in layers:
        for name, given in layer.items():
            if name in known:
                merged[name] = given
            elif not (name in foreign and given.source.startswith(ENVIRONMENT_PREFIX)):
                raise BadConfiguration(f"{given.source}: there is no setting {name!r}{_nearest(name, known)}")
    return merged


def build(model: type[Model], merged: Layer) -> Model:
    """The model with everything that was given for it. Raises BadConfiguration naming value and source."""
    tree: dict[str, Any] = {}
    known = leaves(model)
    for name in known.keys() & merged.keys():
        *path, last = name.split(".")
        branch = tree
        for step in path:
            branch = branch.setdefault(step, {})
        branch[last] = _read(merged[name].value, known[name].annotation)
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        raise BadConfiguration(_sentence(error, merged)) from error


def explain(settings: BaseModel, merged: Layer) -> list[Setting]:
    """Every value of a built model, with where it came from."""
    values = tree_layer(settings.model_dump(mode="json"), "default")
    return [
        Setting(name, values[name].value, merged[name].source if name in merged else "default")
        for name in leaves(type(settings))
    ]


def _read(value: Any, annotation: Any) -> Any:
    """Text from an environment or a flag, shaped for its field: `none`, lists with commas; the rest is pydantic's."""
    if not isinstance(value, str):
        return value
    options = get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else (annotation,)
    if types.NoneType in options and value.lower() == "none":
        return None
    if any(get_origin(option) is tuple for option in options):
        return [item.strip() for item in value.split(",") if item.strip()]
    return value


def _sentence(error: ValidationError, merged: Layer) -> str:
    """The first thing that is wrong, in one line."""
    first = error.errors(include_url=False)[0]
    path = [str(step) for step in first["loc"]]
    message = first["msg"].removeprefix("Value error, ")
    for length in range(len(path), 0, -1):  # a loc may go on into a tuple's item
        name = ".".join(path[:length])
        if name in merged:
            return f"{merged[name].source}: {message}"
    if first["type"] == "missing":
        return f"{'.'.join(path)} is missing: give --{path[-1].replace('_', '-')}"
    return f"{'.'.join(path)}: {message}" if path else message


def _nearest(name: str, known: Iterable[str]) -> str:
    match = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    return f"; did you mean {match[0]!r}?" if match else ""
