"""What keeps the house in order: versions, stubs, layers, what is shipped, and no CUDA on machines that have none."""

import ast
import re
import subprocess
import sys
import tomllib
from importlib.metadata import distributions
from pathlib import Path

import pytest
import torch

import swarmoe

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protos", "experts", "peer", "trainer", "coordinator", "swarmoe")
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = [file for package in PACKAGES for file in sorted((ROOT / package).rglob("*.py")) if "_pb2" not in file.name]


def test_torch_is_asked_for_as_the_range_that_has_cpu_wheels() -> None:
    asked = [line for line in PYPROJECT["project"]["dependencies"] if re.match(r"torch\b", line)]

    assert asked == ["torch>=2.10,<2.14"]  # docs/decisions/003-torch-range.md
    everything = [line for extra in PYPROJECT["project"]["optional-dependencies"].values() for line in extra]
    assert not [line for line in everything if re.match(r"torch\b", line)]


def test_a_cpu_build_of_torch_brought_no_cuda_packages() -> None:
    names = {distribution.metadata["Name"].lower() for distribution in distributions()}

    cuda = sorted(name for name in names if name.startswith(("nvidia-", "triton")))
    assert not cuda or "+cpu" not in torch.__version__, cuda


def test_the_version_is_one_everywhere() -> None:
    assert PYPROJECT["project"]["version"] == swarmoe.__version__


def test_the_stubs_are_those_of_the_schema(tmp_path: Path) -> None:
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-I", ".", *outputs, "protos/swarm.proto"],
        cwd=ROOT,
        check=True,
        timeout=60,
    )

    fresh = {file.name: file.read_text() for file in (tmp_path / "protos").iterdir()}
    assert fresh.keys() == {"swarm_pb2.py", "swarm_pb2.pyi", "swarm_pb2_grpc.py"}
    for name, text in fresh.items():
        assert text == (ROOT / "protos" / name).read_text(), f"{name} is not fresh: run `make protos`"


@pytest.mark.parametrize("package", PACKAGES)
def test_every_package_is_shipped_typed_and_in_the_layers(package: str) -> None:
    assert package in PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert package in PYPROJECT["tool"]["importlinter"]["root_packages"]
    assert package == "protos" or package in PYPROJECT["tool"]["basedpyright"]["include"]


def test_every_module_says_what_it_is() -> None:
    silent = [str(file.relative_to(ROOT)) for file in SOURCES if not ast.get_docstring(ast.parse(file.read_text()))]

    assert silent == []


def _reaches_for(tree: ast.AST) -> set[str]:
    """Dotted names that are imported or called."""
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    return imported | {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


def test_nothing_is_unpickled_or_evaluated() -> None:
    dangerous = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "torch.load", "eval", "exec", "compile"}

    found = {str(file.relative_to(ROOT)): _reaches_for(ast.parse(file.read_text())) & dangerous for file in SOURCES}

    assert {name: hits for name, hits in found.items() if hits} == {}


def test_modules_have_names_that_own_something() -> None:
    nobody = re.compile(r"(^|_)(utils?|common|helpers?|misc|managers?)(_|$)")

    named = [str(file.relative_to(ROOT)) for file in SOURCES if nobody.search(file.stem)]
    shadowing = [str(file.relative_to(ROOT)) for file in SOURCES if file.stem in sys.stdlib_module_names]

    assert named == []
    assert shadowing == []


def test_make_test_starts_at_the_gates_and_ci_is_make_test() -> None:
    makefile = (ROOT / "Makefile").read_text()
    test = re.search(r"^test: (.*)\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    lint = re.search(r"^lint: .*\n((?:\t.*\n)+)", makefile, re.MULTILINE)

    assert test is not None
    assert lint is not None
    assert test[1].split()[0] == "lint"
    assert [line.split()[0] for line in lint[1].splitlines()] == [
        f"$(BIN)/{tool}" for tool in ("ruff", "ruff", "lint-imports", "basedpyright")
    ]
    assert "pytest -x" in test[2].splitlines()[-1]  # its closing line closes
    assert (ROOT / ".ci" / "run").read_text().splitlines()[-1] == "make test"
