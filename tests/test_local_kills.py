from swarmoe.local_kills import QUIET_END_S, KillPlan, remaining_s

PEERS = ["peer-0", "peer-1", "peer-2"]


def test_nobody_is_killed_before_training_begins() -> None:
    plan = KillPlan(every_s=10.0, seed=0)

    assert plan.pick(PEERS, remaining_s=1000.0, now_s=500.0) is None


def test_one_peer_is_killed_every_interval() -> None:
    plan = KillPlan(every_s=10.0, seed=0)
    plan.training_began(now_s=100.0)

    assert plan.pick(PEERS, remaining_s=1000.0, now_s=109.9) is None
    assert plan.pick(PEERS, remaining_s=1000.0, now_s=110.0) in PEERS
    assert plan.pick(PEERS, remaining_s=1000.0, now_s=110.1) is None
    assert plan.pick(PEERS, remaining_s=1000.0, now_s=120.0) in PEERS


def test_the_end_is_quiet() -> None:
    plan = KillPlan(every_s=10.0, seed=0)
    plan.training_began(now_s=0.0)

    assert plan.pick(PEERS, remaining_s=QUIET_END_S, now_s=10.0) is None


def test_the_seed_decides_whom() -> None:
    def victims(seed: int) -> list[str | None]:
        plan = KillPlan(every_s=1.0, seed=seed)
        plan.training_began(now_s=0.0)
        return [plan.pick(PEERS, remaining_s=1000.0, now_s=float(now_s)) for now_s in range(1, 30)]

    assert victims(1) == victims(1)
    assert victims(1) != victims(2)
    assert set(victims(1)) == set(PEERS)


def test_what_remains_is_told_from_the_pace_so_far() -> None:
    assert remaining_s(steps_done=0, steps=100, elapsed_s=0.0) == float("inf")
    assert remaining_s(steps_done=25, steps=100, elapsed_s=50.0) == 150.0
