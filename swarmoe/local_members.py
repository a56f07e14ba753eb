"""The members of a local swarm as processes: started, ready, killed, restarted, and all gone at the end.

Knows the commands' flags and what they print when they are ready; not what a verdict is.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field

from peer.errors import CouldNotJoin
from swarmoe.local_log import Event, MergedLog
from swarmoe.local_process import Child

READY_WITHIN_S = 120.0
"""Imports included, with every member starting at once on two cores."""
LEAVE_WITHIN_S = 8.0


@dataclass
class Member:
    """One place in the swarm; a killed peer's successor takes the same."""

    name: str
    arguments: list[str]
    ready_line: str
    """What it prints when it is ready ends in the rest of this line: `join: ADDRESS`."""
    ready: "asyncio.Future[str]"
    child: Child | None = None
    may_end: bool = False
    """It was asked or forced to, or ends by itself when its work is done."""
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    exit_code: int | None = None


class Members:
    """All of them. Belongs to one event loop; made by `open_members`."""

    def __init__(self, log: MergedLog, tasks: asyncio.TaskGroup) -> None:
        self._log = log
        self._tasks = tasks
        self._members: dict[str, Member] = {}
        self.failures: list[str] = []
        """Who ended when they should not have, in words."""

    async def start(self, name: str, arguments: list[str], *, ready_line: str, may_end: bool = False) -> Member:
        """Start one member; it is ready when `member.ready` is done."""
        ready: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        member = Member(name, arguments, ready_line, ready, may_end=may_end)
        self._members[name] = member
        await self._launch(member)
        return member

    async def until_ready(self, member: Member) -> str:
        """What it said when it was. Raises CouldNotJoin when it ends or takes too long before that."""
        ended = asyncio.ensure_future(member.ended.wait())
        try:
            await asyncio.wait({member.ready, ended}, timeout=READY_WITHIN_S, return_when=asyncio.FIRST_COMPLETED)
        finally:
            ended.cancel()
        if member.ready.done():
            return member.ready.result()
        what = f"ended with {member.exit_code}" if member.ended.is_set() else f"was not in {READY_WITHIN_S:.0f} s"
        raise CouldNotJoin(f"{member.name} should have become ready and {what}; its lines above say why")

    async def kill(self, member: Member) -> None:
        """SIGKILL, and wait until the kernel has taken it away."""
        assert member.child is not None
        member.may_end = True
        member.child.kill()
        await member.ended.wait()

    async def restart(self, member: Member) -> None:
        """A new process in the same place."""
        member.ready = asyncio.get_running_loop().create_future()
        member.ended.clear()
        member.may_end = False
        await self._launch(member)

    def note(self, event: Event) -> None:
        """Told of every line: finds out who is ready."""
        member = self._members.get(event.member)
        text = str(event.fields.get("text", ""))
        if member is not None and not member.ready.done() and text.startswith(member.ready_line):
            member.ready.set_result(text.removeprefix(member.ready_line).strip())

    async def stop_all(self) -> None:
        """Ask everybody to leave, the last started first; end who does not."""
        living = [m for m in reversed(self._members.values()) if m.child is not None and not m.child.has_ended]
        for member in living:
            member.may_end = True
            assert member.child is not None
            member.child.terminate()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_WITHIN_S):
                for member in living:
                    await member.ended.wait()
        for member in living:
            assert member.child is not None
            if not member.child.has_ended:
                self._log.say(member.name, f"did not leave in {LEAVE_WITHIN_S:.0f} s; ending it")
                member.child.kill()

    async def _launch(self, member: Member) -> None:
        member.child = await Child.start(member.name, member.arguments)
        self._tasks.create_task(self._attend(member, member.child), name=member.name)

    async def _attend(self, member: Member, child: Child) -> None:
        member.exit_code = await child.run(lambda text, is_stdout: self._log.line(member.name, text, is_stdout))
        if not member.may_end:
            self.failures.append(f"{member.name} ended with {member.exit_code} though nobody asked it to")
            self._log.say(member.name, f"ended with {member.exit_code}")
        member.ended.set()


@contextlib.asynccontextmanager
async def open_members(log: MergedLog) -> AsyncGenerator[Members]:
    """Members that are all gone when this is left, however it is left."""
    async with asyncio.TaskGroup() as tasks:
        members = Members(log, tasks)
        try:
            yield members
        finally:
            await asyncio.shield(members.stop_all())
