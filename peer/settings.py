"""What a peer's owner decides: addresses, device, how much to host, where state lives. The rest is the manifest's.

An option's docstring is its help text and its `title` the placeholder the help prints for its value.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from experts.uid import ExpertUid
from peer.addresses import split_address

STATE_HOME = Path("~/.local/state/swarmoe")


def _address(text: str) -> str:
    split_address(text, allow_port_0=True)
    return text


def _join_address(text: str) -> str:
    if text == "lan":
        raise ValueError("finding peers on the local network is not built yet; give HOST:PORT or HOST:PORT/KEY")
    from peer.bootstrap import parse_join  # brings cryptography, which `--help` can do without

    parse_join(text)
    return text


Address = Annotated[str, AfterValidator(_address), Field(title="HOST:PORT")]
JoinAddress = Annotated[str, AfterValidator(_join_address)]
JoinAddresses = Annotated[tuple[JoinAddress, ...], Field(title="HOST:PORT[/KEY]")]
Folder = Annotated[Path, AfterValidator(Path.expanduser), Field(title="DIR", validate_default=True)]
Device = Literal["auto", "cpu", "cuda", "mps"]


def parse_experts(text: str) -> tuple[ExpertUid, ...]:
    """Read `0.0-0.3,1.5`: uids and ranges within one layer, sorted, each once. ValueError on anything else."""
    uids: set[ExpertUid] = set()
    for part in text.split(","):
        first_text, dash, last_text = part.strip().partition("-")
        first = ExpertUid.parse(first_text)
        last = ExpertUid.parse(last_text) if dash else first
        if first.layer != last.layer or last.index < first.index:
            raise ValueError(f"{part!r} is not a range; write it upwards within one layer, for example 0.0-0.3")
        uids |= {ExpertUid(first.layer, index) for index in range(first.index, last.index + 1)}
    return tuple(sorted(uids))


def _experts(text: str | None) -> str | None:
    if text is not None:
        parse_experts(text)
    return text


class LocalModel(BaseModel):
    """Base of everything a person sets on their own machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class LinkSettings(LocalModel):
    """A network slower and narrower than it is: see `emulated_transport`. Each process limits itself."""

    latency_ms: Annotated[float, Field(ge=0, le=60_000, title="L")] = 0.0
    """Hold back what a process receives, in ms one way; a call's round trip grows by this for each of its two ends."""
    jitter_ms: Annotated[float, Field(ge=0, le=60_000, title="J")] = 0.0
    """Up to so many ms more, drawn for each call and direction."""
    bandwidth_mbit: Annotated[float | None, Field(gt=0, le=1e6, title="W")] = None
    """Most that a process's calls may send, and most they may receive, in Mbit/s; none: no limit."""

    @property
    def is_emulated(self) -> bool:
        return bool(self.latency_ms or self.jitter_ms or self.bandwidth_mbit)


class LossyLinkSettings(LinkSettings):
    """For those who make calls."""

    loss: Annotated[float, Field(ge=0, le=1, title="P")] = 0.0
    """Chance that the answer to a call never comes, forward and backward alike; 0.02 is one call in fifty."""


class PeerSettings(LinkSettings):
    """`swarmoe peer`"""

    join: Annotated[JoinAddresses, Field(min_length=1)]
    """Anyone already in the swarm; KEY pins who must answer there. May be given several times."""
    listen: Address = "0.0.0.0:0"
    """Where other members reach this peer; port 0 takes a free one."""
    http: Address = "127.0.0.1:0"
    """Where this peer shows its own state: /api/state, /metrics, /healthz."""
    device: Device = "auto"
    """What the experts run on; auto takes cuda, then mps, then cpu."""
    experts: Annotated[str | None, AfterValidator(_experts), Field(title="0.0-0.3")] = None
    """Experts to host, as uids and ranges; none: the least covered ones."""
    max_experts: Annotated[int | None, Field(ge=0, title="N")] = None
    """Most experts to host; none: as many as fit in memory."""
    state_dir: Folder = STATE_HOME / "peer"
    """Identity and snapshots; a peer restarted on its folder goes on where it was."""
    link_seed: Annotated[int, Field(ge=0, title="X")] = 0
    """Seed of what is drawn for emulated links."""

    def pinned_experts(self) -> tuple[ExpertUid, ...] | None:
        """The experts named by `experts`; None when the peer chooses."""
        return None if self.experts is None else parse_experts(self.experts)


class DoctorSettings(LocalModel):
    """`swarmoe doctor`"""

    join: JoinAddresses = ()
    """Also check the way to this swarm: who answers, how fast the link is, and how busy it lets the device be."""
    listen: Address = "0.0.0.0:0"
    """The address a peer would listen on; port 0 checks that any port can be bound."""
    device: Device = "auto"
    """What the experts would run on; auto takes cuda, then mps, then cpu."""
    state_dir: Folder = STATE_HOME / "peer"
    """The folder whose disk a peer would fill."""
