import os
import signal
import subprocess
import sys
import threading

import pytest

from peer.signals import STOP_SIGNALS, stop_on_signals


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_a_request_with_its_name(number: signal.Signals) -> None:
    with stop_on_signals() as stop:
        os.kill(os.getpid(), number)

        assert stop.wait() == number.name


def test_any_thread_may_ask() -> None:
    with stop_on_signals() as stop:
        threading.Thread(target=stop.request, args=("the device is gone",)).start()

        assert stop.wait() == "the device is gone"


def test_what_handled_signals_before_handles_them_again() -> None:
    before = [signal.getsignal(number) for number in STOP_SIGNALS]

    with stop_on_signals():
        pass

    assert [signal.getsignal(number) for number in STOP_SIGNALS] == before


@pytest.mark.process
def test_a_second_signal_ends_the_process_at_once() -> None:
    program = (
        "from peer.signals import stop_on_signals\n"
        "import os, signal\n"
        "with stop_on_signals() as stop:\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print(stop.wait(), flush=True)\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    print('still here', flush=True)\n"
    )

    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False)

    assert ended.stdout == "SIGTERM\n"
    assert ended.returncode == -signal.SIGTERM
