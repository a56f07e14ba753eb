"""A contestant as a process: asked for one turn at a time over stdin, answers on stdout, both a line of JSON.

It runs in a session of its own: whatever it starts is in it, and is gone when the contest is over. A contestant whose
stdin has closed ends, and takes its session with it if that takes long: nothing outlives a parent that was killed.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from queue import SimpleQueue
from typing import IO

import torch

READY = "ready"
_LEAVE_WITHIN_S = 20.0
_SHOWN_LOG = 4000

Round = Callable[[], object]
"""One forward and backward of one client."""
Task = Callable[[int], AbstractContextManager[Round]]
"""Makes rounds of so many rows; leaving it may raise, if they were none."""


@dataclass(frozen=True)
class Turn:
    """What is measured at once: `clients` threads do `rounds` rounds each of one task on batches of `rows` rows."""

    task: str
    rows: int
    clients: int
    rounds: int


class TurnFailed(Exception):
    """A round raised: the turn has no time."""


def answer_turns(tasks: Mapping[str, Task]) -> None:
    """The contestant's side: say that it is ready, then take turns until stdin ends."""
    torch.set_num_threads(1)
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    print(READY, file=answers)
    for line in _lines_while_wanted():
        turn = Turn(**json.loads(line))
        try:
            with tasks[turn.task](turn.rows) as one_round:
                answer = {"seconds": seconds_per_round(turn, one_round)}
        except Exception as error:  # the top of a turn: the next one may go well
            answer = {"failed": repr(error)}
        print(json.dumps(answer), file=answers)


def _lines_while_wanted() -> Iterator[str]:
    """Lines of stdin. Its end is noticed in the middle of a turn too, which then has not long to live."""
    lines: SimpleQueue[str] = SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            lines.put(line)
        lines.put("")
        time.sleep(_LEAVE_WITHIN_S)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    threading.Thread(target=read, daemon=True).start()
    while line := lines.get():
        yield line


def seconds_per_round(turn: Turn, one_round: Round) -> float:
    """Wall time in which every client did one round, after one round to warm up."""

    def client(_: int) -> None:
        torch.autograd.set_multithreading_enabled(False)  # thread-local; else backwards share one thread of the device
        one_round()
        everybody.wait()
        for _ in range(turn.rounds):
            one_round()

    started_s: list[float] = []
    everybody = threading.Barrier(turn.clients, action=lambda: started_s.append(time.perf_counter()))
    with ThreadPoolExecutor(turn.clients) as threads:
        list(threads.map(client, range(turn.clients)))
    return (time.perf_counter() - started_s[0]) / turn.rounds


class Contestant:
    """The parent's side of one contestant. Made by `contestant`."""

    def __init__(self, name: str, process: "subprocess.Popen[str]", log: IO[str]) -> None:
        self.name = name
        self._log = log
        assert process.stdin is not None
        assert process.stdout is not None
        self._to: IO[str] = process.stdin
        self._from: IO[str] = process.stdout

    def until_ready(self) -> None:
        """Blocks. RuntimeError when it ends before it is."""
        while self._line() != READY:
            pass

    def take(self, turn: Turn) -> float:
        """Seconds of a round. Raises TurnFailed when one failed, RuntimeError when the contestant has ended."""
        print(json.dumps(asdict(turn)), file=self._to, flush=True)
        answer = json.loads(self._line())
        if "failed" in answer:
            raise TurnFailed(answer["failed"])
        return float(answer["seconds"])

    def _line(self) -> str:
        line = self._from.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.name} has ended. It said:\n{self._log.read()[-_SHOWN_LOG:]}")
        return line.rstrip("\n")


@contextlib.contextmanager
def contestant(module: str, *arguments: str) -> Generator[Contestant]:
    """`python -m MODULE ARGUMENTS`, from its start until nothing of it is left."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        try:
            yield Contestant(module, process, log)
        finally:
            assert process.stdin is not None
            process.stdin.close()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=_LEAVE_WITHIN_S)
            with contextlib.suppress(ProcessLookupError):  # all of it left in good order
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
