import pytest

from swarmoe.local_report import ExpertCounts, Observed, find_problems, make_report
from trainer.ledger import Ledger
from trainer.summary import TrainerSummary, edge_means

ALL_ALIVE = ExpertCounts(total=16, alive=16, restored=4, reinitialised=0)


def observed(**changes: object) -> Observed:
    facts = {"preset": "demo", "seed": 0, "peers": 4, "trainers": 1, "kills": 1, "experts": ALL_ALIVE, "failures": ()}
    return Observed(**(facts | changes))  # type: ignore[arg-type]


def summary(**changes: object) -> TrainerSummary:
    counts = Ledger().read()
    facts = {
        "steps": 300, "steps_skipped": 1, "first_step_unix_s": 1000.0, "last_step_unix_s": 1100.0, "tokens": 5000,
        "train_bits_per_byte_first": 7.0, "train_bits_per_byte_last": 3.0, "val_bits_per_byte": 3.1,
        "calls": counts.calls, "pairs": counts.pairs, "lost_by_reason": counts.lost_by_reason,
        "backwards": counts.backwards, "bytes_up": 600, "bytes_down": 400,
    }  # fmt: skip
    return TrainerSummary.model_validate(facts | changes)


def test_the_report_adds_up_the_trainers() -> None:
    report = make_report(observed(trainers=2), [summary(), summary(last_step_unix_s=1200.0, val_bits_per_byte=3.3)])

    assert report["steps"] == 300
    assert report["steps_skipped"] == 2
    assert report["wall_s"] == 200.0
    assert report["tokens"] == 10000
    assert report["tokens_per_s"] == 50.0
    assert report["bytes_per_token"] == 0.2
    assert report["val_bits_per_byte"] == pytest.approx(3.2)
    assert report["verdict"] == "ok"


@pytest.mark.parametrize(
    ("seen", "summaries", "word"),
    [
        (observed(), [], "no summary"),
        (observed(), [summary(gave_up="nobody answers")], "gave up"),
        (observed(experts=ExpertCounts(16, 12, 0, 0)), [summary()], "12 of 16"),
        (observed(), [summary(train_bits_per_byte_last=7.5)], "did not fall"),
        (observed(), [summary(train_bits_per_byte_last=None)], "did not fall"),
        (observed(), [summary(val_bits_per_byte=None)], "held-out"),
        (observed(), [summary(val_bits_per_byte=7.1)], "held-out"),
        (observed(failures=("peer-1 ended with 1",)), [summary()], "peer-1"),
    ],
)
def test_every_reason_to_fail_is_said(seen: Observed, summaries: list[TrainerSummary], word: str) -> None:
    report = make_report(seen, summaries)

    assert report["verdict"] == "failed"
    assert any(word in problem for problem in find_problems(seen, summaries))


def test_edge_means_take_a_twentieth_of_the_steps_and_at_least_one() -> None:
    assert edge_means([]) == (None, None)
    assert edge_means([5.0, 4.0, 3.0]) == (5.0, 3.0)
    assert edge_means([float(n) for n in range(40)]) == (0.5, 38.5)
