"""`swarmoe local`: a whole swarm on this machine, each member a process of its own, on loopback; ends with a verdict.

Starts the commands that a user would, waits for readiness by reading what they say, and prints one merged log.
"""

import asyncio
import contextlib
import json
import math
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

from peer.errors import BadConfiguration
from peer.held import only_cause
from peer.manifest import RunManifest
from swarmoe.exit_codes import ExitCode
from swarmoe.local_kills import RESTART_AFTER_S, KillPlan, remaining_s
from swarmoe.local_log import Event, MergedLog
from swarmoe.local_members import Member, Members, open_members
from swarmoe.local_report import ExpertCounts, Observed, in_words, make_report
from swarmoe.run_presets import manifest_toml
from swarmoe.settings import LocalSettings
from trainer.summary import TrainerSummary, read_summary

_LOOPBACK = "127.0.0.1:0"
_STEP_LINE = re.compile(r"step (\d+)/\d+")
_LOOK_EVERY_S = 1.0
_HTTP_TIMEOUT_S = 5.0
_MEND_WITHIN_S = 30.0
_PROMPT = "It is a truth universally acknowledged, that "


def run_local(settings: LocalSettings, manifest: RunManifest) -> int:
    """Run the swarm to its verdict; returns the exit code. Ctrl+C ends everything it started."""
    _check_paths(settings, manifest)
    folder = Path(tempfile.mkdtemp(prefix="swarmoe-local-"))
    try:
        report = asyncio.run(_until_signalled(_LocalSwarm(settings, manifest, folder).run()))
    except BaseExceptionGroup as group:
        raise only_cause(group) from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if report is None:
        print("interrupted before the end; everything that was started has been ended", file=sys.stderr)
        return ExitCode.TRAINING_GAVE_UP
    if settings.report is not None:
        settings.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(in_words(report))
    return ExitCode.DONE if report["verdict"] == "ok" else ExitCode.TRAINING_GAVE_UP


def _check_paths(settings: LocalSettings, manifest: RunManifest) -> None:
    """Find out now, not after minutes of training. Raises BadConfiguration."""
    if settings.data is not None:
        from trainer.data import ByteDataset  # brings torch, which nothing else here needs

        ByteDataset.open(settings.data, context=manifest.model.context)
    if settings.report is not None:
        try:
            settings.report.parent.mkdir(parents=True, exist_ok=True)
            had_report = settings.report.exists()
            settings.report.open("a").close()
            if not had_report:
                settings.report.unlink()  # a run that ends early leaves no empty one
        except OSError as error:
            raise BadConfiguration(f"--report {settings.report}: {error.strerror}; give another file") from error


async def _until_signalled(work: Any) -> dict[str, Any] | None:
    """Its result; None when SIGINT or SIGTERM came first, after it has cleaned up.

    Whoever presses Ctrl+C again waits too: the cleaning up has its own limit, and cut off it would leave things behind.
    """
    task = asyncio.ensure_future(work)
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, lambda: task.cancelling() or task.cancel())
    with contextlib.suppress(asyncio.CancelledError):
        return await task
    return None


class _LocalSwarm:
    """One run of it."""

    def __init__(self, settings: LocalSettings, manifest: RunManifest, folder: Path) -> None:
        self._settings = settings
        self._manifest = manifest.model_copy(update={"seed": settings.seed})
        self._steps = settings.steps if settings.steps is not None else manifest.steps
        self._folder = folder
        self._log = MergedLog(sys.stderr, self._note)
        self._members: Members | None = None
        self._peers: list[Member] = []
        self._state_url = ""
        self._training_began_s: float | None = None
        self._steps_done = 0
        self._kills = 0
        self._restored = 0
        self._reinitialised = 0

    async def run(self) -> dict[str, Any]:
        """Start, train, look, stop; the report."""
        self._announce()
        async with open_members(self._log) as members:
            self._members = members
            join = await self._start_coordinator(members)
            await self._start_peers(members, join)
            trainers = await self._start_trainers(members, join)
            await self._kill_until_ended(members, trainers)
            alive = await self._count_alive()
            await self._sample(members, join)
            failures = [*members.failures, *(f"{t.name} ended with {t.exit_code}" for t in trainers if t.exit_code)]
        return make_report(self._observed(alive, tuple(failures)), self._summaries())

    def _announce(self) -> None:
        """Say what is pretended, so that nobody takes the figures for this machine's."""
        link, loss = self._settings, self._settings.loss
        if link.is_emulated or loss:
            width = "as wide as it is" if link.bandwidth_mbit is None else f"{link.bandwidth_mbit:g} Mbit/s a direction"
            delay = f"{link.latency_ms:g} to {link.latency_ms + link.jitter_ms:g} ms one way"
            self._log.say("local", f"emulating for every process: {delay}, {width}, {loss:.1%} of answers lost")

    async def _start_coordinator(self, members: Members) -> str:
        run_file = self._folder / "run.toml"
        run_file.write_text(manifest_toml(self._manifest), encoding="utf-8")
        arguments = ["coordinator", f"--run={run_file}", f"--listen={_LOOPBACK}", f"--http={_LOOPBACK}"]
        join = await members.until_ready(
            await members.start("coordinator", self._with_folder("coordinator", arguments), ready_line="join:")
        )
        if self._settings.dashboard:
            self._log.say("local", f"watch it at {self._state_url.removesuffix('api/state')}")
        return join

    async def _start_peers(self, members: Members, join: str) -> None:
        each = math.ceil(len(self._manifest.uids()) / self._settings.peers)
        self._log.say("local", f"starting {self._settings.peers} peers with up to {each} experts each")
        for number in range(self._settings.peers):
            arguments = [
                "peer",
                f"--join={join}",
                f"--listen={_LOOPBACK}",
                f"--http={_LOOPBACK}",
                f"--max-experts={each}",
                *self._link(seed=number),
            ]
            name = f"peer-{number}"
            self._peers.append(await members.start(name, self._with_folder(name, arguments), ready_line="join:"))
        for peer in self._peers:
            await members.until_ready(peer)

    async def _start_trainers(self, members: Members, join: str) -> list[Member]:
        data = [] if self._settings.data is None else [f"--data={self._settings.data}"]
        trainers: list[Member] = []
        for number in range(self._settings.trainers):
            name = f"trainer-{number}"
            arguments = [
                "train", f"--join={join}", f"--steps={self._steps}", f"--checkpoint-dir={self._folder / name}",
                f"--data-shard={number}", "--log-format=json", f"--loss={self._settings.loss}",
                *self._link(seed=self._settings.peers + number), *data,
            ]  # fmt: skip
            trainers.append(await members.start(name, arguments, ready_line="joined:", may_end=True))
        for trainer in trainers:
            await members.until_ready(trainer)
        return trainers

    def _link(self, *, seed: int) -> list[str]:
        """Every member's own end of the emulated network; the coordinator, which only introduces, has none."""
        settings = self._settings
        bandwidth = [] if settings.bandwidth_mbit is None else [f"--bandwidth-mbit={settings.bandwidth_mbit}"]
        delay = [f"--latency-ms={settings.latency_ms}", f"--jitter-ms={settings.jitter_ms}"]
        return [*delay, *bandwidth, f"--link-seed={(settings.seed << 7) + seed}"]

    def _with_folder(self, name: str, arguments: list[str]) -> list[str]:
        return [*arguments, f"--state-dir={self._folder / name}", "--log-format=json"]

    async def _kill_until_ended(self, members: Members, trainers: list[Member]) -> None:
        """Wait for all trainers, and meanwhile kill as asked. Whoever was killed is started again before this ends."""
        async with asyncio.TaskGroup() as tasks:
            if self._settings.kill_every is not None:
                tasks.create_task(self._kill_regularly(members, trainers, every_s=self._settings.kill_every))
            for trainer in trainers:
                await trainer.ended.wait()

    async def _kill_regularly(self, members: Members, trainers: list[Member], *, every_s: float) -> None:
        plan = KillPlan(every_s=every_s, seed=self._settings.seed)
        while not all(trainer.ended.is_set() for trainer in trainers):
            await asyncio.sleep(_LOOK_EVERY_S)
            now_s = time.monotonic()
            if self._training_began_s is None:
                continue
            plan.training_began(now_s=self._training_began_s)
            left_s = remaining_s(
                steps_done=self._steps_done, steps=self._steps, elapsed_s=now_s - self._training_began_s
            )
            alive = {peer.name: peer for peer in self._peers if peer.ready.done() and not peer.ended.is_set()}
            victim = plan.pick(list(alive), remaining_s=left_s, now_s=now_s)
            if victim is not None:
                await self._kill(members, alive[victim])

    async def _kill(self, members: Members, peer: Member) -> None:
        self._kills += 1
        self._log.say("local", f"killing {peer.name} (SIGKILL); it comes back in {RESTART_AFTER_S:.0f} s")
        await members.kill(peer)
        await asyncio.sleep(RESTART_AFTER_S)
        self._log.say("local", f"restarting {peer.name} with a new identity on its folder")
        await asyncio.to_thread((self._folder / peer.name / "identity.key").unlink, missing_ok=True)
        await members.restart(peer)

    async def _count_alive(self) -> int:
        """Experts somebody serves, as the coordinator sees it; a peer that has just restarted gets time to be seen."""
        deadline_s = time.monotonic() + _MEND_WITHIN_S
        while True:
            try:
                state = await asyncio.to_thread(_read_json, self._state_url)
            except OSError:
                return 0  # the coordinator is gone, which is in the failures
            served = len(state["experts"]) - len(state["uncovered"])
            if not state["uncovered"] or time.monotonic() > deadline_s:
                return served
            await asyncio.sleep(_LOOK_EVERY_S)

    async def _sample(self, members: Members, join: str) -> None:
        """Show what the model writes. Part of the show, not of the verdict."""
        trunk = self._folder / "trainer-0"
        arguments = ["generate", f"--join={join}", f"--checkpoint-dir={trunk}", f"--prompt={_PROMPT}", "--length=120"]
        arguments += [f"--seed={self._settings.seed}", "--log-level=warning"]
        self._log.say("local", "asking the swarm to go on writing ...")
        sampler = await members.start("sample", arguments, ready_line="\0", may_end=True)
        await sampler.ended.wait()

    def _note(self, event: Event) -> None:
        """Told of every line that any member says."""
        if self._members is not None:
            self._members.note(event)
        if event.name == "coordinator.ready":
            self._state_url = f"{event.fields['dashboard']}api/state"
        elif event.name == "expert.restored":
            self._restored += 1
        elif event.name == "expert.fresh":
            self._reinitialised += self._training_began_s is not None
        elif step := _STEP_LINE.match(str(event.fields.get("text", ""))):
            self._training_began_s = self._training_began_s or time.monotonic()
            self._steps_done = max(self._steps_done, int(step[1]))

    def _observed(self, alive: int, failures: tuple[str, ...]) -> Observed:
        return Observed(
            preset=self._settings.preset,
            seed=self._settings.seed,
            peers=self._settings.peers,
            trainers=self._settings.trainers,
            kills=self._kills,
            experts=ExpertCounts(len(self._manifest.uids()), alive, self._restored, self._reinitialised),
            failures=failures,
        )

    def _summaries(self) -> list[TrainerSummary]:
        found = [read_summary(self._folder / f"trainer-{number}") for number in range(self._settings.trainers)]
        return [summary for summary in found if summary is not None]


def _read_json(url: str) -> dict[str, Any]:
    with urllib.request.urlopen(url, timeout=_HTTP_TIMEOUT_S) as response:
        return json.load(response)
