"""Transformer blocks as experts: each sequence for itself, no token sees the future or the padding."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from experts.bank import ExpertBank
from experts.blocks import num_heads
from experts.grouped import run_one_by_one
from experts.initial import initial_weights
from experts.registry import ExpertKind, expert_kind, register_expert
from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.snapshots import SnapshotFolder
from experts.uid import ExpertUid, RunId, initial_seed

A, B, C = (ExpertUid(0, index) for index in range(3))
UIDS, COUNTS, LENGTHS = (B, A, C), (9, 0, 7), (4, 2, 3, 6, 1)
DIM, HIDDEN = 8, 12


@register_expert("running_mean_of_a_user", schema="sequence")
class RunningMean(nn.Module):
    """Needs the lengths: it divides by them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.mix = nn.Linear(dim, dim)

    def forward(self, x_LSD: Tensor, lengths_L: Tensor) -> Tensor:
        return torch.tanh(self.mix(x_LSD).cumsum(1)) / lengths_L[:, None, None]


KINDS = ["block", "stack", "running_mean_of_a_user"]


def shape_of(kind: str) -> ExpertShape:
    return ExpertShape(kind=kind, dim=DIM, hidden=HIDDEN, **({"blocks": 2} if kind == "stack" else {}))


def bank_of(kind: str, **settings: object) -> ExpertBank:
    optimizer = ExpertOptimizerSettings.model_validate(settings)
    bank = ExpertBank(shape_of(kind), optimizer, device=torch.device("cpu"), seed=5)
    for uid in (A, B, C):
        bank.add(uid)
    return bank


def module_of(kind: str, uid: ExpertUid) -> nn.Module:
    module = expert_kind(kind).build(shape_of(kind))
    module.load_state_dict(initial_weights(expert_kind(kind), shape_of(kind), initial_seed(5, uid)))
    return module


def rows(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, DIM, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_and_its_step_equal_the_module_on_each_sequence_alone(kind: str) -> None:
    bank = bank_of(kind, name="sgd", learning_rate=1.0, clip_norm=None)
    modules = {uid: module_of(kind, uid) for uid in UIDS}
    owners = (B, B, B, C, C)
    x_ND, grad_ND = rows(16, 1), rows(16, 2)
    leaf_ND = x_ND.clone().requires_grad_()
    expected_ND = torch.cat(
        [
            modules[uid](sequence[None], torch.tensor([len(sequence)]))[0]
            for uid, sequence in zip(owners, leaf_ND.split(LENGTHS), strict=True)
        ]
    )
    expected_ND.backward(grad_ND / 7.0)
    torch.optim.SGD([p for module in modules.values() for p in module.parameters()], lr=1.0).step()

    pass_ = bank.forward(x_ND, UIDS, COUNTS, keep_graph=True, lengths=LENGTHS)
    grad_x_ND = bank.backward(pass_, grad_ND, loss_tokens=7.0)
    steps = bank.step(UIDS)

    assert leaf_ND.grad is not None
    assert pass_.lengths == ((4, 2, 3), (), (6, 1))
    torch.testing.assert_close(pass_.out_ND, expected_ND.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad_x_ND, leaf_ND.grad * 7.0, rtol=1e-5, atol=1e-5)
    assert steps.versions == {B: 1, C: 1}
    for uid, module in modules.items():
        torch.testing.assert_close(dict(bank.state(uid).weights), module.state_dict(), rtol=1e-5, atol=1e-5)


def test_a_backward_after_a_step_computes_the_sequences_again() -> None:
    bank, oracle = bank_of("stack"), bank_of("stack")
    kept = bank.forward(rows(5), (A,), (5,), keep_graph=True, lengths=(2, 3))
    for one in (bank, oracle):
        other = one.forward(rows(4, 1), (A,), (4,), keep_graph=True, lengths=(4,))
        one.backward(other, rows(4, 2), loss_tokens=1.0)
        one.step((A,))

    was_current = bank.is_current(kept)
    grad_x_ND = bank.backward(kept, rows(5, 3), loss_tokens=1.0)

    fresh = oracle.forward(rows(5), (A,), (5,), keep_graph=True, lengths=(2, 3))
    assert not was_current
    torch.testing.assert_close(grad_x_ND, oracle.backward(fresh, rows(5, 3), loss_tokens=1.0))


@pytest.mark.parametrize("kind", ["block", "stack"])
def test_no_token_sees_those_after_it_nor_another_sequence(kind: str) -> None:
    bank = bank_of(kind)
    x_ND = rows(9)
    changed_ND = x_ND.clone()
    changed_ND[3:] += 1.0  # from the last token of the first sequence on

    first = bank.forward(x_ND, (A,), (9,), keep_graph=False, lengths=(4, 5)).out_ND
    second = bank.forward(changed_ND, (A,), (9,), keep_graph=False, lengths=(4, 5)).out_ND
    alone = bank.forward(x_ND[4:], (A,), (5,), keep_graph=False, lengths=(5,)).out_ND

    assert torch.equal(first[:3], second[:3])
    assert not torch.equal(first[3], second[3])
    torch.testing.assert_close(first[4:], alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["block", "stack"])
def test_gradcheck(kind: str) -> None:
    shape, known = shape_of(kind), expert_kind(kind)
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(1, *size, dtype=torch.float64, generator=generator).mul_(0.3).requires_grad_()
        for name, size in known.parameter_shapes(shape).items()
    }
    x_ND = torch.randn(6, DIM, dtype=torch.float64, generator=generator).requires_grad_()

    def run(x_ND: Tensor, *stacked: Tensor) -> Tensor:
        return run_one_by_one(known, shape, x_ND, dict(zip(weights, stacked, strict=True)), (6,), [(1, 3, 2)])

    assert torch.autograd.gradcheck(run, (x_ND, *weights.values()), fast_mode=True)


@pytest.mark.slow
def test_a_block_equals_a_layer_of_qwen2() -> None:
    from transformers.models.qwen2.configuration_qwen2 import Qwen2Config
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RotaryEmbedding

    torch.manual_seed(0)
    shape = ExpertShape(kind="block", dim=128, hidden=96)
    config = Qwen2Config(
        hidden_size=128, intermediate_size=96, num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-6
    )
    config._attn_implementation = "sdpa"
    theirs, ours = Qwen2DecoderLayer(config, layer_idx=0), expert_kind("block").build(shape)
    x_LSD, positions_LS = torch.randn(2, 9, 128), torch.arange(9).expand(2, 9)

    ours.load_state_dict(theirs.state_dict())
    expected = theirs(x_LSD, position_embeddings=Qwen2RotaryEmbedding(config)(x_LSD, positions_LS))

    expected_LSD = expected if isinstance(expected, Tensor) else expected[0]
    torch.testing.assert_close(ours(x_LSD, torch.tensor([9, 9])), expected_LSD, rtol=1e-5, atol=1e-5)


def test_kinds_say_their_cost() -> None:
    block, stack = expert_kind("block"), expert_kind("stack")
    linear = 4 * DIM * DIM + 3 * DIM * HIDDEN + 3 * DIM + 2 * DIM

    assert block.num_parameters(shape_of("block")) == linear
    assert stack.num_parameters(shape_of("stack")) == 2 * linear
    assert block.flops_per_token(shape_of("block"), context=1) == 2 * linear + 2 * 2 * DIM
    assert stack.flops_per_token(shape_of("stack"), context=127) == 2 * (2 * linear + 2 * 2 * 64 * DIM)


@pytest.mark.parametrize(("dim", "heads"), [(8, 1), (64, 1), (128, 2), (192, 3), (200, 2), (4096, 64), (62, 1)])
def test_heads_have_64_channels_or_more(dim: int, heads: int) -> None:
    assert num_heads(dim) == heads


def test_an_odd_width_is_refused() -> None:
    with pytest.raises(ValueError, match=r"even expert\.dim.* 7 is odd"):
        ExpertBank(
            ExpertShape(kind="block", dim=7, hidden=8),
            ExpertOptimizerSettings(),
            device=torch.device("cpu"),
            seed=0,
        )


@pytest.mark.parametrize("lengths", [(16,) * 2, (1, 15, 7, 9)], ids=["alike", "ragged"])
def test_what_a_graph_holds_is_no_more_than_it_says(lengths: tuple[int, ...]) -> None:
    bank = bank_of("stack")
    held: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        pass_ = bank.forward(rows(32), (A,), (32,), keep_graph=True, lengths=lengths)

    assert pass_.graphs is not None
    for tensor in (pass_.x_ND, *next(iter(pass_.graphs.values())).weights):
        held.pop(tensor.untyped_storage().data_ptr(), None)
    assert 0 < sum(held.values()) <= pass_.graph_bytes


@pytest.mark.hostile
def test_lengths_come_with_sequence_level_experts_and_only_with_these() -> None:
    token_level = ExpertBank(
        ExpertShape(kind="ffn", dim=DIM, hidden=HIDDEN), ExpertOptimizerSettings(), device=torch.device("cpu"), seed=0
    )
    token_level.add(A)

    with pytest.raises(ValueError, match="these are ffn"):
        token_level.forward(rows(4), (A,), (4,), keep_graph=False, lengths=(4,))
    with pytest.raises(ValueError, match="these are block"):
        bank_of("block").forward(rows(4), (A,), (4,), keep_graph=False)
    with pytest.raises(ValueError, match="do not fit"):
        bank_of("block").forward(rows(4), (A, B), (2, 2), keep_graph=False, lengths=(3, 1))


def test_a_kind_that_sees_sequences_is_known_as_one() -> None:
    kinds: dict[str, ExpertKind] = {name: expert_kind(name) for name in ("ffn", "swiglu", *KINDS)}

    assert [name for name, kind in kinds.items() if kind.is_sequence_level] == KINDS


def test_a_stack_comes_back_from_its_snapshot_exactly_as_it_was(tmp_path: Path) -> None:
    origin, other = bank_of("stack"), bank_of("stack")
    for bank in (origin, other):
        pass_ = bank.forward(rows(5), (A,), (5,), keep_graph=True, lengths=(2, 3))
        bank.backward(pass_, rows(5, 1), loss_tokens=1.0)
    origin.step((A,))
    SnapshotFolder(tmp_path).save({A: origin.state(A)}, RunId("a" * 32))

    other.load(A, SnapshotFolder(tmp_path).load_newest(RunId("a" * 32)).states[A])

    x_ND = rows(5, 2)
    expected_ND = origin.forward(x_ND, (A,), (5,), keep_graph=False, lengths=(5,)).out_ND
    assert other.version(A) == 1
    assert torch.equal(other.forward(x_ND, (A,), (5,), keep_graph=False, lengths=(5,)).out_ND, expected_ND)
