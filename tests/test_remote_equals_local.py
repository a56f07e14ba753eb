"""Experts on other machines compute and learn what the same experts would in this process."""

from collections.abc import Mapping

import pytest
from torch import Tensor

from experts.settings import ExpertOptimizerSettings, ExpertShape
from experts.state import ExpertState
from experts.uid import ExpertUid
from peer.manifest import RunManifest, TrunkOptimizerSettings
from tests.swarm import DIM, MemorySwarm, local_experts, local_states, local_training_loop, tiny_run, training_loop

pytestmark = pytest.mark.slow

STEPS = 20
SGD = ExpertOptimizerSettings(name="sgd", learning_rate=0.1)
ALMOST_SGD = TrunkOptimizerSettings(learning_rate=0.3, betas=(0.0, 0.99), eps=1.0, warmup_steps=0, weight_decay=0.0)
"""No momentum, and an epsilon that dwarfs the second moment: Adam would turn a rounding error into a whole step where a
gradient is all but zero (the biases of the keys)."""


def losses_here(manifest: RunManifest) -> tuple[list[float], dict[str, Tensor], dict[ExpertUid, ExpertState]]:
    experts = local_experts(manifest)
    with local_training_loop(manifest, experts) as loop:
        losses = [loss_of(loop.step(step)) for step in range(STEPS)]
        return losses, loop.model.state_dict(), local_states(experts)


def losses_of_three_peers(
    manifest: RunManifest,
) -> tuple[list[float], dict[str, Tensor], dict[ExpertUid, ExpertState]]:
    with MemorySwarm(manifest) as swarm, training_loop(swarm) as loop:
        swarm.spread_over(3)
        losses = [loss_of(loop.step(step)) for step in range(STEPS)]
        counts = loop.ledger.read()
        assert counts.pairs["lost"] == counts.backwards["lost"] == 0
        assert counts.calls["sent"] == counts.backwards["sent"] <= STEPS * manifest.moe_layers * 3
        return losses, loop.model.state_dict(), swarm.states()


def loss_of(outcome) -> float:
    assert outcome.skipped is None
    return outcome.bits_per_byte


def relative(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).norm() / theirs.norm().clamp(min=1e-12))


def worst(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> tuple[float, str]:
    assert ours.keys() == theirs.keys()
    return max((relative(ours[name].float(), theirs[name].float()), name) for name in theirs)


def test_with_adamw_the_losses_of_twenty_steps_are_equal() -> None:
    manifest = tiny_run()

    here, _, _ = losses_here(manifest)
    remote, _, _ = losses_of_three_peers(manifest)

    furthest = max(abs(a - b) / b for a, b in zip(remote, here, strict=True))
    print(f"AdamW: losses differ by at most {furthest:.2e} relative")
    assert furthest <= 1e-5
    assert here[-1] < here[0]


@pytest.mark.parametrize(
    "expert",
    [ExpertShape(dim=DIM, hidden=24), ExpertShape(kind="stack", dim=DIM, hidden=24, blocks=2)],
    ids=lambda shape: shape.kind,
)
def test_with_sgd_every_parameter_is_equal_as_well(expert: ExpertShape) -> None:
    manifest = tiny_run(expert=expert, optimizer=SGD, trunk=ALMOST_SGD)

    here, trunk_here, experts_here = losses_here(manifest)
    remote, trunk_remote, experts_remote = losses_of_three_peers(manifest)

    trunk = worst(trunk_remote, trunk_here)
    experts = {uid: worst(experts_remote[uid].weights, experts_here[uid].weights) for uid in experts_here}
    print(f"SGD: trunk {trunk}, experts {max(experts.values())}")
    assert max(abs(a - b) / b for a, b in zip(remote, here, strict=True)) <= 1e-5
    assert trunk[0] <= 1e-5
    assert experts_remote.keys() == experts_here.keys()
    assert max(experts.values())[0] <= 1e-5
    assert {uid: state.clock for uid, state in experts_remote.items()} == {
        uid: state.clock for uid, state in experts_here.items()
    }


@pytest.mark.parametrize("codec", ["bf16", "fp16", "int8"])
def test_with_rounding_on_the_wire_the_final_loss_differs_by_less_than_one_percent(codec: str) -> None:
    here, _, _ = losses_here(tiny_run())
    remote, _, _ = losses_of_three_peers(tiny_run(codec=codec))

    furthest = max(abs(a - b) / b for a, b in zip(remote, here, strict=True))
    last = abs(remote[-1] - here[-1]) / here[-1]
    print(f"{codec}: the final losses differ by {last:.2e}, the others by {furthest:.2e}")
    assert 0 < last < 0.01
