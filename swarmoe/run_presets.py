"""Runs by name: the TOML files beside this module, and how one becomes a manifest under what else was given."""

import json
import tomllib
from importlib import resources
from pathlib import Path
from typing import Any

from peer.errors import BadConfiguration
from peer.manifest import RunManifest
from swarmoe.configuration import Layer, build, leaves, merge, tree_layer

_FOLDER = resources.files("swarmoe") / "presets"


def preset_names() -> list[str]:
    """What `--preset` takes."""
    return sorted(file.name.removesuffix(".toml") for file in _FOLDER.iterdir() if file.name.endswith(".toml"))


def file_layer(path: Path) -> Layer:
    """What a TOML file says. Raises BadConfiguration when it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadConfiguration(f"{path}: {getattr(error, 'strerror', None) or 'not a text file'}") from error
    return tree_layer(_parse(text, str(path)), str(path))


def preset_layer(name: str) -> Layer:
    """What the preset says. Raises BadConfiguration for a name that is none."""
    if name not in preset_names():
        raise BadConfiguration(f"there is no preset {name!r}; there are: {', '.join(preset_names())}")
    return tree_layer(_parse((_FOLDER / f"{name}.toml").read_text(encoding="utf-8"), name), f"preset {name}")


def run_manifest(given: Layer, *, preset: str, file: Path | None = None) -> tuple[RunManifest, Layer]:
    """The run, and where each of its values came from: the preset or file, under everything in `given`."""
    base = merge([RunManifest], [preset_layer(preset) if file is None else file_layer(file)])
    layer = {**base, **given}
    return build(RunManifest, layer), layer


def manifest_toml(manifest: RunManifest) -> str:
    """A run file that `--run` reads back to the same manifest."""
    values = tree_layer(manifest.model_dump(mode="json"), "")
    # JSON scalars and lists are TOML; TOML has no null, which our reader takes as the text "none".
    return "".join(
        f"{name} = {json.dumps('none' if values[name].value is None else values[name].value)}\n"
        for name in leaves(RunManifest)
    )


def _parse(text: str, source: str) -> dict[str, Any]:
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise BadConfiguration(f"{source}: not TOML: {error}") from error
