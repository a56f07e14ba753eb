"""A newcomer's first page: every path it names exists, every command and flag is one we have, in the order promised."""

import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from swarmoe.cli import COMMANDS
from swarmoe.run_presets import preset_names

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
MADE_BY_USE = {"runs/demo.json", ".venv"}


@cache
def _readme() -> str:
    return (ROOT / "README.md").read_text()


def _tree_paths() -> list[str]:
    """The paths of the file tree: a line indented below a folder is inside it."""
    tree = _readme().split("## What is where")[1].split("```")[1]
    paths: list[str] = []
    folder = ""
    for line in filter(str.strip, tree.splitlines()):
        name, purpose = line.split(maxsplit=1)
        assert purpose
        folder = folder if line.startswith(" ") else name
        paths.append(folder + name if line.startswith(" ") else name)
    return paths


def _commands() -> list[str]:
    """Every `swarmoe ...` and `make ...` of the page, in blocks and between backticks."""
    spans = re.findall(r"`((?:swarmoe|make) [^`]+)`", _readme())
    blocks = [line for block in _readme().split("```")[1::2] for line in block.splitlines()]
    return [*spans, *(line for line in blocks if re.match(r"(swarmoe|make) ", line))]


def test_every_path_of_the_file_tree_exists() -> None:
    missing = [path for path in _tree_paths() if not (ROOT / path).exists()]

    assert missing == []
    assert len(_tree_paths()) > 20


def test_the_file_tree_has_every_package() -> None:
    packages = {folder.name + "/" for folder in ROOT.iterdir() if (folder / "__init__.py").is_file()}

    assert packages <= set(_tree_paths())


def test_every_path_between_backticks_exists() -> None:
    named = {span for span in re.findall(r"`([\w./-]+)`", _readme()) if "/" in span or span.endswith((".py", ".md"))}

    missing = [path for path in named - MADE_BY_USE if not (ROOT / path).exists()]

    assert missing == []
    assert named


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())

    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]

    assert missing == []


def test_every_command_is_one_we_have_with_its_flags() -> None:
    settings = {command.name: command.settings.model_fields.keys() for command in COMMANDS}
    makefile = (ROOT / "Makefile").read_text()

    for line in _commands():
        program, name, *rest = shlex.split(line)
        flags = {word.split("=")[0] for word in rest if word.startswith("--")}
        if program == "make":
            assert re.search(rf"^{name}:", makefile, re.MULTILINE), line
        elif name == "config":
            assert rest[0] == "show", line
            assert flags <= {"--presets", "--json"}, line
        else:
            known = {f"--{field.replace('_', '-')}" for field in settings[name]} | {"--set", "--config", "--json"}
            assert flags <= known, line
    assert {"make demo", "make test"} <= set(_commands())


def test_every_preset_it_names_exists() -> None:
    named = re.findall(r"--preset (\w+)", _readme())

    assert named
    assert set(named) <= set(preset_names())


def test_the_code_is_read_in_six_files() -> None:
    section = _readme().split("## Read the code in this order")[1].split("\n## ")[0]

    files = re.findall(r"^\d\. `([^`]+)`", section, re.MULTILINE)

    assert len(files) == 6
    assert all((ROOT / file).is_file() for file in files)


@pytest.mark.parametrize("decision", sorted((ROOT / "docs" / "decisions").glob("*.md")), ids=lambda file: file.stem)
def test_a_decision_says_why_what_else_and_when_it_is_wrong(decision: Path) -> None:
    text = decision.read_text()

    assert re.match(rf"# {decision.name[:3]}: ", text)
    for part in ("**Context.**", "**Choice.**", "**Alternatives.**", "**We would be wrong if**"):
        assert part in text
