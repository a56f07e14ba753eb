"""When a peer with room may take an expert that nobody serves."""

from experts.uid import ExpertUid
from peer.vacancies import GRACE_S, Vacancies

A, B, C = (ExpertUid(0, index) for index in range(3))


def test_an_expert_that_was_never_served_is_free_at_once() -> None:
    vacancies = Vacancies([A, B])

    vacancies.observe({B}, now_s=100.0)

    assert vacancies.open((), now_s=100.0) == ([], [A])


def test_one_that_was_served_is_free_after_its_grace() -> None:
    vacancies = Vacancies([A])
    vacancies.observe({A}, now_s=100.0)
    vacancies.observe((), now_s=110.0)

    assert vacancies.open((), now_s=110.0 + GRACE_S - 0.1) == ([], [])
    assert vacancies.open((), now_s=110.0 + GRACE_S) == ([], [A])


def test_the_grace_begins_anew_when_its_host_has_been_back() -> None:
    vacancies = Vacancies([A])
    vacancies.observe({A}, now_s=100.0)
    vacancies.observe((), now_s=110.0)
    vacancies.observe({A}, now_s=120.0)
    vacancies.observe((), now_s=125.0)

    assert vacancies.open((), now_s=110.0 + GRACE_S) == ([], [])
    assert vacancies.open((), now_s=125.0 + GRACE_S) == ([], [A])


def test_one_whose_snapshot_we_hold_is_ours_to_take_at_once_and_comes_first() -> None:
    vacancies = Vacancies([A, B, C])
    vacancies.observe({A, B}, now_s=100.0)
    vacancies.observe((), now_s=110.0)

    assert vacancies.open({B}, now_s=110.0) == ([B], [C])


def test_what_somebody_serves_is_not_vacant_whoever_has_its_snapshot() -> None:
    vacancies = Vacancies([A])
    vacancies.observe({A}, now_s=100.0)

    assert vacancies.open({A}, now_s=1000.0) == ([], [])


def test_strangers_are_not_ours_to_take() -> None:
    vacancies = Vacancies([A])
    vacancies.observe((), now_s=100.0)

    assert vacancies.open({B}, now_s=1000.0) == ([], [A])
