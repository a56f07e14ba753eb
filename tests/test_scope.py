import threading

from peer.transport import PeerId
from trainer.ledger import Ledger
from trainer.scope import MicroBatch, StepScope, current_micro_batch


def scope() -> StepScope:
    return StepScope(deadline_s=10.0, ledger=Ledger())


def test_a_peer_that_failed_is_suspected_for_the_rest_of_the_step() -> None:
    step = scope()

    step.suspect(PeerId("anne"))

    assert step.is_suspect(PeerId("anne"))
    assert not step.is_suspect(PeerId("beth"))


def test_the_worst_layer_is_the_one_of_which_least_came_back_over_all_micro_batches() -> None:
    step = scope()
    step.answered(0, sent=10, answered=10)
    step.answered(1, sent=10, answered=2)
    step.answered(1, sent=10, answered=10)

    worst = step.worst_layer()

    assert worst is not None
    layer, answers = worst
    assert (layer, answers.share) == (1, 0.6)


def test_a_layer_to_which_nothing_could_be_sent_counts_as_unanswered() -> None:
    step = scope()
    step.answered(0, sent=0, answered=0)

    worst = step.worst_layer()

    assert worst is not None
    assert worst[1].share == 0.0


def test_routers_learn_after_the_step_in_micro_batch_order() -> None:
    step, seen = scope(), []
    MicroBatch(step, 1).observe(lambda: seen.append("second"))
    MicroBatch(step, 0).observe(lambda: seen.append("first"))

    assert seen == []
    step.apply_observations()

    assert seen == ["first", "second"]


def test_outside_a_training_loop_a_router_learns_at_once() -> None:
    seen: list[str] = []

    MicroBatch(scope(), defer_observations=False).observe(lambda: seen.append("now"))

    assert seen == ["now"]


def test_the_current_micro_batch_belongs_to_its_thread() -> None:
    elsewhere: list[MicroBatch | None] = []
    mine = MicroBatch(scope())

    with mine.activate():
        thread = threading.Thread(target=lambda: elsewhere.append(current_micro_batch()))
        thread.start()
        thread.join()

        assert current_micro_batch() is mine
    assert elsewhere == [None]
    assert current_micro_batch() is None
