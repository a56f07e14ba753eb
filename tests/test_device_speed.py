"""How fast a device is on a run's experts, by a clock that a test winds."""

from collections.abc import Callable
from itertools import chain, repeat

import pytest

from experts.registry import expert_kind
from experts.settings import ExpertShape
from peer.device_speed import measure_device
from peer.manifest import ModelSettings, RunManifest
from tests.swarm import CPU, tiny_run

KINDS = [
    ExpertShape(kind="ffn", dim=16, hidden=24),
    ExpertShape(kind="swiglu", dim=16, hidden=24),
    ExpertShape(kind="block", dim=16, hidden=24),
    ExpertShape(kind="stack", dim=16, hidden=24, blocks=2),
]


def showing(*seconds: float) -> Callable[[], float]:
    """A clock that shows these, look by look, and stops at the last."""
    shown = chain(seconds, repeat(seconds[-1]))
    return lambda: next(shown)


@pytest.mark.parametrize("shape", KINDS, ids=lambda shape: shape.kind)
def test_flops_are_those_of_a_forward_and_a_backward_of_every_token(shape: ExpertShape) -> None:
    run = tiny_run(expert=shape)

    measured = measure_device(run, CPU, clock=showing(0.0, 0.0, 0.5))

    assert measured is not None
    assert measured.tokens_per_s == 64 / 0.5
    assert measured.flops_per_s == 64 / 0.5 * 3 * expert_kind(shape.kind).flops_per_token(shape, context=16)


def test_the_fastest_pass_counts() -> None:
    first, second, third = (0.0, 0.1), (0.1, 0.1, 0.12, 0.12), (0.12, 0.12, 0.22, 0.22)

    measured = measure_device(tiny_run(), CPU, clock=showing(0.0, *first, *second, *third))

    assert measured is not None
    assert measured.tokens_per_s == pytest.approx(64 / 0.02)


def test_an_expert_that_leaves_no_room_is_not_measured() -> None:
    huge = RunManifest(expert=ExpertShape(dim=1 << 15, hidden=1 << 20), model=ModelSettings(dim=1 << 15))

    assert measure_device(huge, CPU) is None
