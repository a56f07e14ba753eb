from trainer.ledger import BackwardOutcome, Counts, Ledger, LossReason


def test_sent_is_what_was_answered_plus_what_was_lost() -> None:
    ledger = Ledger()
    ledger.call(answered=True)
    ledger.call(answered=False)
    ledger.pairs_answered(10)
    ledger.pairs_lost(3, LossReason.TIMEOUT)
    ledger.pairs_lost(2, LossReason.DECLINED)
    for outcome in BackwardOutcome:
        ledger.backward(outcome)
    ledger.moved(bytes_up=5, bytes_down=7)

    counts = ledger.read()

    assert counts.calls == {"sent": 2, "answered": 1, "lost": 1, "retried": 0, "hedged": 0}
    assert counts.pairs == {"sent": 15, "answered": 10, "lost": 5, "declined": 2}
    assert sum(counts.lost_by_reason.values()) == counts.pairs["lost"]
    assert counts.backwards == {"sent": 3, "applied": 1, "lost": 1, "stale": 1, "duplicate": 0}
    assert (counts.bytes_up, counts.bytes_down) == (5, 7)
    assert counts.answered_share == 10 / 15


def test_before_the_first_call_everything_was_answered() -> None:
    assert Ledger().read().answered_share == 1.0


def test_the_report_carries_every_reason_by_name() -> None:
    report = Ledger().read().as_report()

    assert set(report["lost_by_reason"]) == {  # type: ignore[arg-type]
        "timeout",
        "unreachable",
        "declined",
        "malformed",
        "non_finite",
        "stale",
        "no_primary",
    }
    assert set(report) == set(Counts.__dataclass_fields__)
