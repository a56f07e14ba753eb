"""The `swarmoe` command from outside: names, flags, one JSON object, exit codes; and that it is quick to answer."""

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

import swarmoe
from peer import errors
from peer.settings import LocalModel
from swarmoe import cli
from swarmoe.command_line import Command, Invocation
from swarmoe.exit_codes import CODE_OF, RESOLVE, ExitCode, exit_code_of

ROOT = Path(__file__).resolve().parent.parent
FLAGS = {
    "coordinator": "preset run listen http state-dir",
    "peer": "join listen http device experts max-experts state-dir latency-ms jitter-ms bandwidth-mbit",
    "train": "join steps data checkpoint-dir resume latency-ms jitter-ms loss bandwidth-mbit",
    "local": "peers trainers steps preset seed report data kill-every latency-ms jitter-ms loss bandwidth-mbit nat "
    "no-dashboard",
    "status": "join json",
    "doctor": "join json",
    "generate": "join json",
    "version": "json",
    "checkpoint": "",
    "relay": "",
    "token": "",
}


def every_error() -> list[type[errors.SwarmError]]:
    """Those of the table in peer/errors.py; what modules derive for themselves they also catch."""
    return [error for error in vars(errors).values() if isinstance(error, type)]


@pytest.fixture(autouse=True)
def _as_in_a_fresh_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for variable in [name for name in os.environ if name.startswith("SWARMOE_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("COLUMNS", "200")
    root = logging.getLogger()
    handlers, level = root.handlers, root.level

    yield

    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


@pytest.mark.parametrize("command", FLAGS)
def test_every_command_helps_with_its_flags(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run([command, "--help"])

    text = capsys.readouterr().out
    assert code == ExitCode.DONE
    for flag in ["config", "set", "log-format", *FLAGS[command].split()]:
        assert re.search(rf"--{flag}\b", text), flag
    assert all("[default: " in line or "[required]" in line for line in _flag_paragraphs(text))


def _flag_paragraphs(text: str) -> list[str]:
    """Each flag's help as one line, those without a default left out."""
    paragraphs = re.split(r"\n  (?=--)", text.split("Options:\n", 1)[1])
    plain = ("--help", "--config", "--set", "--json")
    return [" ".join(p.split()) for p in paragraphs if not p.strip().startswith(plain)]


@pytest.mark.parametrize("command", ["checkpoint", "relay", "token"])
def test_a_command_that_is_not_built_says_so(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run([command])

    assert code == ExitCode.USAGE
    assert capsys.readouterr().err == f"error: swarmoe {command} is not built yet\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["peer"],
        ["peer", "--join", "lan"],
        ["peer", "--join", "nonsense"],
        ["peer", "--joun", "a:1"],
        ["local", "--nat"],
        ["local", "--loss", "2"],
        ["local", "--preset", "dmeo"],
        ["local", "--set", "router.prest=switch"],
        ["local", "--config", "/no/such/file.toml"],
        ["coordinator", "--preset", "demo", "--run", "run.toml"],
        ["config", "show", "pier"],
        ["no-such-command"],
    ],
)
def test_a_mistake_is_one_line_on_stderr_and_exit_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(arguments)

    captured = capsys.readouterr()
    assert code == ExitCode.USAGE
    assert re.fullmatch(r"error: .+\n", captured.err)
    assert captured.out == ""


def test_version_is_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["version", "--json"])

    assert code == ExitCode.DONE
    assert json.loads(capsys.readouterr().out)["version"] == swarmoe.__version__


def test_doctor_is_one_json_object(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code = cli.run(["doctor", "--json", "--state-dir", str(tmp_path)])

    checks = json.loads(capsys.readouterr().out)["checks"]
    assert code == ExitCode.DONE
    assert {"python", "torch", "device", "memory", "disk", "clock", "ports"} <= {check["name"] for check in checks}
    assert all(check.keys() == {"name", "status", "detail", "fix"} for check in checks)


def test_doctor_ends_as_an_error_where_a_peer_would(capsys: pytest.CaptureFixture[str], silent_listener: str) -> None:
    code = cli.run(["doctor", "--listen", silent_listener])

    assert code == ExitCode.USAGE
    assert "ERROR  ports" in capsys.readouterr().out


def test_config_show_says_where_a_value_comes_from(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "swarm.toml"
    file.write_text("peers = 3\n[router]\npreset = 'switch'\n")
    monkeypatch.setenv("SWARMOE_BATCH__SEQUENCES", "8")

    code = cli.run(["config", "show", "--json", "--config", str(file), "--set", "router.preset=gshard"])

    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)["settings"]}
    assert code == ExitCode.DONE
    assert (rows["peers"]["value"], rows["peers"]["source"]) == (3, str(file))
    assert (rows["batch.sequences"]["value"], rows["batch.sequences"]["source"]) == (8, "SWARMOE_BATCH__SEQUENCES")
    assert (rows["router.preset"]["value"], rows["router.preset"]["source"]) == ("gshard", "--set router.preset")
    assert (rows["expert.dim"]["value"], rows["expert.dim"]["source"]) == (128, "preset demo")
    assert rows["trainers"]["source"] == "default"


def test_config_show_lists_presets_and_routers(capsys: pytest.CaptureFixture[str]) -> None:
    code = cli.run(["config", "show", "--presets", "--json"])

    shown = json.loads(capsys.readouterr().out)
    assert code == ExitCode.DONE
    assert {"demo", "ci"} <= shown["presets"].keys()
    assert {"mixtral", "switch"} <= set(shown["routers"])


def test_every_error_has_an_exit_code_of_its_own_line() -> None:
    assert set(every_error()) == CODE_OF.keys()


@pytest.mark.parametrize("error", every_error())
def test_only_our_own_faults_end_as_bugs(error: type[errors.SwarmError]) -> None:
    is_ours = error is errors.SwarmError or issubclass(error, errors.RequestRejected | errors.MalformedMessage)

    code = exit_code_of(error.__new__(error))

    assert (code == ExitCode.BUG) == is_ours


def test_exit_codes_are_documented_with_how_to_resolve_them() -> None:
    text = (ROOT / "docs" / "exit-codes.md").read_text()

    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|.*\| (.+) \|$", text, re.MULTILINE)

    assert [(int(number), name, resolve) for number, name, resolve in rows] == [
        (code.value, code.name, RESOLVE[code]) for code in ExitCode
    ]


def _failing(error: BaseException) -> Command:
    def start(invocation: Invocation) -> int:
        raise error

    return Command("fails", start, LocalModel)


@pytest.mark.parametrize(
    ("error", "code", "last_line"),
    [
        (errors.CouldNotJoin("nobody answers at a:1"), 4, "error: nobody answers at a:1"),
        (errors.CouldNotListen("a:1 is taken"), 3, "error: a:1 is taken"),
        (ZeroDivisionError("oops"), 1, "error: this is a bug; please report it with the lines above"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_each_end_has_its_code(
    error: BaseException, code: int, last_line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli, "app", cli.new_app([_failing(error), *cli.COMMANDS]))

    assert cli.run(["fails"]) == code
    assert capsys.readouterr().err.strip().rpartition("\n")[2] == last_line


def test_help_and_version_are_quick_and_import_no_torch() -> None:
    code = (
        "import sys; from swarmoe.cli import run; run(['--help']); run(['version']); "
        "print([name for name in ('torch', 'hivemind', 'grpc', 'numpy') if name in sys.modules], file=sys.stderr)"
    )
    started_s = time.monotonic()

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, cwd=ROOT)

    assert done.stderr.strip() == "[]"
    assert f"swarmoe {swarmoe.__version__}" in done.stdout
    assert time.monotonic() - started_s < 5  # 0.6 s on an idle machine


def test_python_m_swarmoe_is_swarmoe() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "swarmoe", "relay"], capture_output=True, text=True, timeout=30, cwd=ROOT
    )

    assert (done.returncode, done.stdout) == (ExitCode.USAGE, "")
    assert done.stderr == "error: swarmoe relay is not built yet\n"
