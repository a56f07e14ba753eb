"""The committed stubs are the schema's."""

from importlib import resources
from pathlib import Path

from grpc_tools import protoc

ROOT = Path(__file__).parent.parent


def test_the_committed_stubs_are_what_the_schema_generates(tmp_path: Path) -> None:
    well_known = resources.files("grpc_tools") / "_proto"
    arguments = [
        f"-I{ROOT}",
        f"-I{well_known}",
        *(f"--{kind}_out={tmp_path}" for kind in ("python", "pyi", "grpc_python")),
    ]

    assert protoc.main(["protoc", *arguments, "protos/swarm.proto"]) == 0

    generated = {path.name: path.read_bytes() for path in (tmp_path / "protos").iterdir()}
    committed = {path.name: path.read_bytes() for path in (ROOT / "protos").glob("swarm_pb2*")}
    assert generated == committed, (
        "run: python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/swarm.proto"
    )
