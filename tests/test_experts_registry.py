"""Expert kinds by name: what is built in, what a user registers, what is refused."""

import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experts.kinds import ffn
from experts.registry import expert_kind, expert_kinds, register_expert
from experts.settings import ExpertShape

NARROW, SHAPE = ExpertShape(dim=4, hidden=12), ExpertShape(dim=8, hidden=16)


def test_built_in_kinds_say_their_shapes_and_cost() -> None:
    ffn, swiglu = expert_kind("ffn"), expert_kind("swiglu")

    assert dict(ffn.parameter_shapes(NARROW)) == {"up_proj.weight": (12, 4), "down_proj.weight": (4, 12)}
    assert list(swiglu.parameter_shapes(NARROW)) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    assert ffn.flops_per_token(NARROW, context=128) == 2 * 2 * 4 * 12
    assert swiglu.flops_per_token(NARROW, context=128) == 2 * 3 * 4 * 12


@pytest.mark.parametrize("name", ["ffn", "swiglu"])
def test_a_built_in_module_computes_what_its_kind_computes(name: str) -> None:
    torch.manual_seed(0)
    kind = expert_kind(name)
    module = kind.build(SHAPE)
    x_ND = torch.randn(3, 8)

    out_ND = kind.apply(SHAPE, x_ND, dict(module.named_parameters()))

    torch.testing.assert_close(out_ND, module(x_ND), rtol=0, atol=0)


@pytest.mark.slow
def test_swiglu_equals_an_expert_of_qwen2_moe() -> None:
    from transformers.models.qwen2_moe.configuration_qwen2_moe import Qwen2MoeConfig
    from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeMLP

    torch.manual_seed(0)
    theirs = Qwen2MoeMLP(Qwen2MoeConfig(hidden_size=8), intermediate_size=16)
    ours = expert_kind("swiglu").build(SHAPE)
    x_ND = torch.randn(5, 8)

    ours.load_state_dict(theirs.state_dict())

    torch.testing.assert_close(ours(x_ND), theirs(x_ND), rtol=0, atol=0)


def test_what_autograd_keeps_of_a_row_is_known_before_a_row_came() -> None:
    saved_bytes = expert_kind("ffn").saved_bytes_per_row(ExpertShape(dim=8, hidden=32))

    assert saved_bytes == 4 * (8 + 32 + 32)  # the row, and what goes into and comes out of the GELU


def test_only_a_stack_has_blocks() -> None:
    assert ExpertShape(kind="stack", dim=8, hidden=8, blocks=2).blocks == 2
    with pytest.raises(ValueError, match=r"expert\.blocks belongs to expert\.kind stack; a ffn has none"):
        ExpertShape(kind="ffn", dim=8, hidden=8, blocks=2)


def test_an_unknown_kind_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'fnn' is not known; known: .*ffn.*swiglu"):
        expert_kind("fnn")


def test_a_name_is_taken_once_but_the_same_class_may_come_again() -> None:
    def define() -> None:
        @register_expert("registered_twice")
        class Twice(nn.Linear):
            pass

    define()
    define()

    with pytest.raises(ValueError, match=r"'registered_twice' is already .*Twice; choose another name"):
        register_expert("registered_twice")(nn.Identity)


@pytest.mark.parametrize("name", ["", "Mixed", "with space", "../up", "x" * 33])
def test_a_malformed_name_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="cannot name an expert kind"):
        register_expert(name)


def test_another_schema_is_refused() -> None:
    with pytest.raises(ValueError, match="schema 'image' is not known; there are token, sequence"):
        register_expert("a_name", schema="image")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a formula is row by row"):
        register_expert("a_name", schema="sequence", formula=ffn)


def test_a_module_with_buffers_or_without_parameters_cannot_be_hosted() -> None:
    @register_expert("has_buffers")
    class HasBuffers(nn.BatchNorm1d):
        def __init__(self, dim: int, hidden: int) -> None:
            super().__init__(dim)

    @register_expert("has_nothing")
    class HasNothing(nn.Module):
        def __init__(self, dim: int, hidden: int) -> None:
            super().__init__()

    with pytest.raises(ValueError, match="has buffers"):
        expert_kind("has_buffers").parameter_shapes(NARROW)
    with pytest.raises(ValueError, match="has no parameters"):
        expert_kind("has_nothing").parameter_shapes(NARROW)


def test_threads_that_run_the_same_module_keep_to_their_own_weights() -> None:
    both_are_in = threading.Barrier(2)

    @register_expert("waits_for_company")
    class WaitsForCompany(nn.Module):
        def __init__(self, dim: int, hidden: int) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(1))

        def forward(self, x_ND: Tensor) -> Tensor:
            both_are_in.wait(timeout=10)
            return x_ND * self.scale

    kind = expert_kind("waits_for_company")

    with ThreadPoolExecutor(2) as threads:
        outs = threads.map(
            lambda scale: kind.apply(NARROW, torch.ones(1, 4), {"scale": torch.tensor([scale])}), (2.0, 3.0)
        )

    assert [out_ND[0, 0].item() for out_ND in outs] == [2.0, 3.0]


def test_an_installed_package_offers_a_kind_by_entry_point(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plugin_of_a_user.py").write_text(
        "from torch import nn\n"
        "from experts.registry import register_expert\n"
        "@register_expert('from_a_package')\n"
        "class Mine(nn.Linear):\n"
        "    pass\n"
    )
    metadata = tmp_path / "plugin_of_a_user-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin-of-a-user\nVersion: 1\n")
    entry_point = EntryPoint("from_a_package", "plugin_of_a_user", "swarmoe.experts")
    (metadata / "entry_points.txt").write_text(f"[{entry_point.group}]\n{entry_point.name} = {entry_point.value}\n")
    monkeypatch.syspath_prepend(tmp_path)

    listed = expert_kinds()
    loaded_by_listing = "plugin_of_a_user" in sys.modules
    kind = expert_kind("from_a_package")

    assert "from_a_package" in listed
    assert not loaded_by_listing
    assert dict(kind.parameter_shapes(NARROW)) == {"weight": (12, 4), "bias": (12,)}
