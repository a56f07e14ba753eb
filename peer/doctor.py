"""Can this machine host experts? Judges what `machine.look` found; each verdict says what to do about it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from peer.chi import chi_of, link_in_words, verdict
from peer.machine import Machine
from peer.remedies import experts_in_words, remedies

GIB = 1 << 30
OLDEST_PYTHON = (3, 11)
OLDEST_TORCH = (2, 10)  # the first with torch.nn.functional.grouped_mm
PEER_MEMORY_BYTES = GIB  # torch and hivemind take about 0.6 GiB before the first expert
PEER_DISK_BYTES = GIB
OLDEST_CLOCK_UNIX_S = 1_767_225_600  # 2026-01-01: no copy of this software is older


@dataclass(frozen=True)
class Check:
    """One line of the diagnosis."""

    name: str
    status: Literal["ok", "warn", "error"]
    detail: str
    fix: str = ""
    """What to do; empty when nothing needs doing."""


def diagnose(machine: Machine) -> list[Check]:
    """Every check, in the order in which to mend them."""
    return [check for judge in CHECKS if (check := judge(machine)) is not None]


def _python(machine: Machine) -> Check:
    version = ".".join(map(str, machine.python))
    if machine.python[:2] < OLDEST_PYTHON:
        return Check("python", "error", version, f"install Python {'.'.join(map(str, OLDEST_PYTHON))} or newer")
    return Check("python", "ok", version)


def _torch(machine: Machine) -> Check:
    major, minor = machine.torch_version.split(".")[:2]
    if (int(major), int(minor)) < OLDEST_TORCH:
        return Check("torch", "error", machine.torch_version, "pip install --upgrade swarmoe")
    return Check("torch", "ok", machine.torch_version)


def _device(machine: Machine) -> Check:
    if machine.device_error is not None:
        return Check("device", "error", machine.device_error, "give another with --device, or auto")
    cores = f"{machine.num_cores} CPU core{'s' * (machine.num_cores != 1)}"
    if machine.accelerator is not None:
        return Check("device", "ok", f"{machine.accelerator}, {cores}")
    if "+cpu" in machine.torch_version:
        return Check("device", "ok", f"{cores}; this torch build is for CPUs only")
    return Check(
        "device", "warn", f"{cores}; torch sees no GPU", "if there is one, install its driver; if not, all is well"
    )


def _memory(machine: Machine) -> Check:
    detail = f"{machine.memory_free_bytes / GIB:.1f} of {machine.memory_total_bytes / GIB:.1f} GiB free"
    if machine.memory_free_bytes < PEER_MEMORY_BYTES:
        return Check("memory", "warn", detail, f"close something: a peer wants {PEER_MEMORY_BYTES / GIB:.0f} GiB")
    return Check("memory", "ok", detail)


def _disk(machine: Machine) -> Check:
    detail = f"{machine.disk_free_bytes / GIB:.1f} GiB free for {machine.state_dir}"
    if not machine.state_dir_writable:
        return Check("disk", "error", f"{machine.state_dir} cannot be written", "give another folder with --state-dir")
    if machine.disk_free_bytes < PEER_DISK_BYTES:
        return Check("disk", "warn", detail, "make room, or give a folder on another disk with --state-dir")
    return Check("disk", "ok", detail)


def _clock(machine: Machine) -> Check:
    fix = "switch on network time: records live 15 s, so a clock that is off hides this peer"
    if machine.now_unix_s < OLDEST_CLOCK_UNIX_S:
        return Check("clock", "error", "the clock is years behind", fix)
    if machine.clock_synchronised is False:
        return Check("clock", "warn", "nothing keeps the clock on time", fix)
    return Check("clock", "ok", "kept on time" if machine.clock_synchronised else "plausible")


def _ports(machine: Machine) -> Check:
    if machine.listen_error is not None:
        fix = "stop whoever listens there, or give another address with --listen"
        return Check("ports", "error", f"{machine.listen}: {machine.listen_error}", fix)
    return Check("ports", "ok", f"{machine.listen} can be bound")


def _dht(machine: Machine) -> Check:
    if machine.dht_daemon is None:
        return Check("dht", "error", "hivemind's p2pd is missing", "pip install --force-reinstall hivemind==1.1.12")
    if not machine.dht_daemon_runs:
        return Check("dht", "error", f"{machine.dht_daemon} is not executable", f"chmod +x {machine.dht_daemon}")
    return Check("dht", "ok", "hivemind's p2pd is there")


def _swarm(machine: Machine) -> Check | None:
    swarm = machine.swarm
    if swarm is None:
        return None
    if not swarm.speaks_our_version:
        return Check("swarm", "error", str(swarm.error), "install the version that the swarm runs")
    if swarm.error is not None:
        fix = "check the address and its key, and that no firewall is between: both ways are TCP"
        return Check("swarm", "error", swarm.error, fix)
    return Check("swarm", "ok", f"run {swarm.run}; first contact in {swarm.answered_in_ms:.0f} ms")


def _link(machine: Machine) -> Check | None:
    if machine.swarm is None or machine.swarm.manifest is None:
        return None
    link = machine.swarm.rates.link
    if link is None:
        return Check("link", "warn", "too slow or too busy to be measured", "ask again in a while, or another address")
    return Check("link", "ok", link_in_words(link))


def _chi(machine: Machine) -> Check | None:
    """How busy the link lets the device be, for each kind of expert of the run; a run has one."""
    if machine.swarm is None or machine.swarm.manifest is None:
        return None
    if machine.swarm.kind_error is not None:
        return Check("chi", "error", machine.swarm.kind_error, "install the package that has the run's expert kind")
    manifest, rates = machine.swarm.manifest, machine.swarm.rates
    chi = chi_of(rates, manifest.wire, dim=manifest.expert.dim)
    if chi is None or rates.link is None or rates.device is None:
        return Check("chi", "warn", "not known: link or device could not be measured", "see the lines above")
    said = verdict(chi, rates.link, rates.device, experts=experts_in_words(manifest.expert))
    if not chi.is_low:
        return Check("chi", "ok", said)
    return Check("chi", "warn", said, f"for the run's owner: {'; '.join(remedies(manifest, chi))}")


CHECKS: tuple[Callable[[Machine], Check | None], ...] = (
    *(_python, _torch, _device, _memory, _disk, _clock, _ports, _dht),
    *(_swarm, _link, _chi),
)
