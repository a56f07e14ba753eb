"""One readable log of many processes. Their JSON lines in; a prefix, an event and its fields out.

Also tells what happened: whoever waits for an event of a member is told here. Decides nothing.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TextIO

_WIDTH = 13
_QUIET = frozenset(
    {"directory.peer", "directory.peer_gone", "expert.fresh", "expert.restored", "http.listening", "dht.joined"}
)
"""Events that a swarm of many members would say many times over; they are for whoever listens, not for reading."""


@dataclass(frozen=True)
class Event:
    """One line a member said."""

    member: str
    name: str
    """The event of a log line, or `stdout` for what it answered."""
    fields: Mapping[str, Any]


class MergedLog:
    """Writes to one stream; told by one thread."""

    def __init__(self, stream: TextIO, listener: Callable[[Event], object]) -> None:
        self._stream = stream
        self._listener = listener

    def line(self, member: str, text: str, is_stdout: bool) -> None:
        """One line of a member, as it came."""
        event = _parse(member, text, is_stdout)
        self._listener(event)
        if event.name not in _QUIET and text.strip():
            self.say(member, describe(event))

    def say(self, member: str, text: str) -> None:
        """A line of our own, or of a member in our words."""
        print(f"{member:<{_WIDTH}} {text}", file=self._stream, flush=True)


def _parse(member: str, text: str, is_stdout: bool) -> Event:
    if not is_stdout:
        try:
            fields = json.loads(text)
        except ValueError:
            fields = None
        if isinstance(fields, dict) and "event" in fields:
            return Event(member, str(fields["event"]), fields)
    return Event(member, "stdout" if is_stdout else "stderr", {"text": text})


def describe(event: Event) -> str:
    """The event and its fields on one line; a traceback below it."""
    if "text" in event.fields:
        return str(event.fields["text"])
    shown = {k: v for k, v in event.fields.items() if k not in {"event", "level", "timestamp", "exception"}}
    level = str(event.fields.get("level", "info"))
    prefix = "" if level in {"info", "debug"} else f"{level}: "
    line = " ".join([f"{prefix}{event.name}", *(f"{key}={value}" for key, value in shown.items())])
    return f"{line}\n{event.fields['exception']}" if "exception" in event.fields else line
