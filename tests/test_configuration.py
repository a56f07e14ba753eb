"""Where values come from, and what is said about the wrong ones."""

from pathlib import Path

import pytest

from peer.errors import BadConfiguration
from peer.manifest import RunManifest
from peer.settings import PeerSettings, parse_experts
from swarmoe.configuration import (
    Layer,
    assignments_layer,
    build,
    environment_layer,
    explain,
    flags_layer,
    leaves,
    merge,
    tree_layer,
)
from swarmoe.run_presets import file_layer, manifest_toml, preset_layer, preset_names, run_manifest
from swarmoe.settings import LocalSettings
from trainer.settings import TrainSettings

FILE: Layer = tree_layer({"join": ["file:1"], "listen": "file:2", "http": "file:3", "max_experts": 4}, "peer.toml")
ENVIRONMENT: Layer = environment_layer({"SWARMOE_LISTEN": "env:2", "SWARMOE_HTTP": "env:3", "PATH": "/bin"})
FLAGS: Layer = flags_layer({"http": "flag:3", "device": None, "experts": None})


def test_a_flag_beats_the_environment_beats_a_file_beats_the_default() -> None:
    settings = build(PeerSettings, merge([PeerSettings], [FILE, ENVIRONMENT, FLAGS]))

    assert settings.http == "flag:3"
    assert settings.listen == "env:2"
    assert settings.max_experts == 4
    assert settings.device == "auto"


def test_every_value_remembers_where_it_came_from() -> None:
    merged = merge([PeerSettings], [FILE, ENVIRONMENT, FLAGS])

    sources = {row.name: row.source for row in explain(build(PeerSettings, merged), merged)}

    assert sources["http"] == "--http"
    assert sources["listen"] == "SWARMOE_LISTEN"
    assert sources["max_experts"] == "peer.toml"
    assert sources["device"] == "default"
    assert sources.keys() == PeerSettings.model_fields.keys()


def test_text_becomes_what_its_field_holds() -> None:
    layer = assignments_layer(["join=a:1, b:2", "max_experts=none", "state_dir=~/here"])

    settings = build(PeerSettings, merge([PeerSettings], [layer]))

    assert settings.join == ("a:1", "b:2")
    assert settings.max_experts is None
    assert settings.state_dir == Path.home() / "here"


@pytest.mark.parametrize(
    ("assignment", "said"),
    [
        ("router.prest=mixtral", "did you mean 'router.preset'?"),
        ("batch.micro_batch=2", "did you mean 'batch.micro_batches'?"),
        ("qqqqqq=1", "there is no setting 'qqqqqq'"),
        ("router.preset", "write --set NAME=VALUE"),
        ("=1", "write --set NAME=VALUE"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest_one(assignment: str, said: str) -> None:
    with pytest.raises(BadConfiguration, match="--set") as raised:
        merge([RunManifest], [assignments_layer([assignment])])

    assert said in str(raised.value)


def test_an_environment_may_name_settings_of_other_commands_and_a_file_may_not() -> None:
    of_train = {"resume": "true"}
    environment = environment_layer({f"SWARMOE_{name.upper()}": text for name, text in of_train.items()})

    merged = merge([PeerSettings], [environment], elsewhere=TrainSettings.model_fields)

    assert merged == {}
    with pytest.raises(BadConfiguration, match=r"peer\.toml: there is no setting 'resume'"):
        merge([PeerSettings], [tree_layer(of_train, "peer.toml")], elsewhere=TrainSettings.model_fields)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({}, "join is missing: give --join"),
        ({"join": ["lan"]}, "--join: finding peers on the local network is not built yet"),
        ({"join": ["host"]}, "--join: 'host' is not an address; write HOST:PORT"),
        ({"join": ["host:70000"]}, "--join: 'host:70000' has no valid port"),
        ({"join": ["host:1/"]}, "--join: "),
        ({"join": ["host:1/key"]}, "--join: "),
        ({"join": ["host:1"], "max_experts": "-1"}, "--max-experts: "),
        ({"join": ["host:1"], "device": "tpu"}, "--device: "),
        ({"join": ["host:1"], "experts": "0.3-0.1"}, "--experts: '0.3-0.1' is not a range"),
        ({"join": ["host:1"], "experts": "zero"}, "--experts: 'zero' is not an expert uid"),
    ],
)
def test_a_wrong_value_is_one_line_that_names_its_source(flags: dict[str, str | list[str]], said: str) -> None:
    with pytest.raises(BadConfiguration) as raised:
        build(PeerSettings, merge([PeerSettings], [flags_layer(flags)]))

    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_flag_whose_machinery_is_missing_says_so() -> None:
    with pytest.raises(BadConfiguration, match="--nat: not built yet"):
        build(LocalSettings, flags_layer({"nat": "1"}))


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("latency_ms", "-1"),
        ("latency_ms", "nan"),
        ("jitter_ms", "inf"),
        ("loss", "1.01"),
        ("bandwidth_mbit", "0"),
        ("bandwidth_mbit", "nan"),
    ],
)
def test_a_network_that_cannot_be_is_refused(name: str, text: str) -> None:
    with pytest.raises(BadConfiguration, match=f"--{name.replace('_', '-')}: "):
        build(LocalSettings, flags_layer({name: text}))


def test_what_a_command_shares_with_others_comes_after_its_own() -> None:
    names = list(leaves(PeerSettings))

    assert names[0] == "join"
    assert names[-3:] == ["latency_ms", "jitter_ms", "bandwidth_mbit"]


def test_expert_ranges_are_read_once_each_and_in_order() -> None:
    uids = parse_experts("1.5, 0.0-0.2,0.1")

    assert [str(uid) for uid in uids] == ["0.0", "0.1", "0.2", "1.5"]


@pytest.mark.parametrize("text", ["", ",", "0", "0.1-", "-0.1", "0.1-1.2", "0.2-0.1", "0.01", "0.1--0.2", "0.1;0.2"])
def test_what_is_no_expert_range_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is not"):
        parse_experts(text)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_run(name: str) -> None:
    manifest, given_by = run_manifest({}, preset=name)

    assert manifest.name == name
    assert given_by["expert.dim"].source == f"preset {name}"


def test_what_is_given_goes_over_the_preset() -> None:
    given = merge([LocalSettings, RunManifest], [assignments_layer(["router.preset=switch", "seed=7"])])

    manifest, _ = run_manifest(given, preset="demo")

    assert manifest.router.preset == "switch"
    assert manifest.seed == 7
    assert build(LocalSettings, given).seed == 7


def test_a_run_file_reads_back_to_the_same_run(tmp_path: Path) -> None:
    given = assignments_layer(["expert_optimizer.clip_norm=none", "router.top_k=1"])
    manifest, _ = run_manifest(given, preset="tiny")
    file = tmp_path / "run.toml"

    file.write_text(manifest_toml(manifest))
    again, _ = run_manifest({}, preset="demo", file=file)

    assert again == manifest
    assert again.run_id == manifest.run_id


def test_the_example_run_is_a_run() -> None:
    file = Path(__file__).resolve().parent.parent / "examples" / "run.toml"

    manifest, sources = run_manifest({}, preset="demo", file=file)

    assert (manifest.name, manifest.router.top_k) == ("mine", 4)
    assert sources["seed"].source == str(file)


def test_an_unknown_preset_is_told_the_names_there_are() -> None:
    with pytest.raises(BadConfiguration, match="there are: ci, demo, tiny"):
        preset_layer("dmeo")


@pytest.mark.parametrize(
    ("content", "said"), [(None, "No such file"), (b"a = ", "not TOML"), (b"\xff\xfe", "not a text file")]
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, content: bytes | None, said: str) -> None:
    file = tmp_path / "swarm.toml"
    if content is not None:
        file.write_bytes(content)

    with pytest.raises(BadConfiguration, match=said) as raised:
        file_layer(file)

    assert str(file) in str(raised.value)
