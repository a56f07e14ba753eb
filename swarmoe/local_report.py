"""The report and the verdict of a local swarm, from what its members wrote down. Pure."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from trainer.summary import TrainerSummary, add_counts


@dataclass(frozen=True)
class ExpertCounts:
    """What became of the run's experts."""

    total: int
    alive: int
    """At the end."""
    restored: int
    """Taken up again from a snapshot after a kill."""
    reinitialised: int
    """Started afresh after training had begun: what they had learnt is lost."""
    taken_over: int = 0
    """By a follower; there are none yet."""


@dataclass(frozen=True)
class Observed:
    """What the one who started the swarm saw."""

    preset: str
    seed: int
    peers: int
    trainers: int
    kills: int
    experts: ExpertCounts
    failures: tuple[str, ...]
    """Members that ended when they should not have, in words."""


def make_report(observed: Observed, summaries: Sequence[TrainerSummary]) -> dict[str, Any]:
    """The JSON object that `--report` writes. Without any summary the figures are zero and the verdict is failed."""
    tokens = sum(summary.tokens for summary in summaries)
    wall_s = _wall_s(summaries)
    num_bytes = sum(summary.bytes_up + summary.bytes_down for summary in summaries)
    problems = find_problems(observed, summaries)
    return {
        "preset": observed.preset,
        "seed": observed.seed,
        "steps": max((summary.steps for summary in summaries), default=0),
        "steps_skipped": sum(summary.steps_skipped for summary in summaries),
        "wall_s": wall_s,
        "tokens": tokens,
        "tokens_per_s": tokens / wall_s if wall_s else 0.0,
        "train_bits_per_byte_first": _mean([summary.train_bits_per_byte_first for summary in summaries]),
        "train_bits_per_byte_last": _mean([summary.train_bits_per_byte_last for summary in summaries]),
        "val_bits_per_byte": _mean([summary.val_bits_per_byte for summary in summaries]),
        "calls": add_counts([summary.calls for summary in summaries]),
        "pairs": add_counts([summary.pairs for summary in summaries]),
        "lost_by_reason": add_counts([summary.lost_by_reason for summary in summaries]),
        "backwards": add_counts([summary.backwards for summary in summaries]),
        "bytes_up": sum(summary.bytes_up for summary in summaries),
        "bytes_down": sum(summary.bytes_down for summary in summaries),
        "bytes_per_token": num_bytes / tokens if tokens else 0.0,
        "experts": vars(observed.experts),
        "kills": observed.kills,
        "peers": observed.peers,
        "trainers": observed.trainers,
        "averaging": {"rounds": 0, "failed": 0, "bytes_up": 0, "bytes_down": 0, "max_relative_distance": 0.0},
        "problems": problems,
        "verdict": "failed" if problems else "ok",
    }


def find_problems(observed: Observed, summaries: Sequence[TrainerSummary]) -> list[str]:
    """Why the verdict is `failed`, one sentence each; empty when it is `ok`."""
    problems = list(observed.failures)
    if len(summaries) < observed.trainers:
        problems.append(f"{observed.trainers - len(summaries)} of {observed.trainers} trainers left no summary")
    problems += [f"a trainer gave up: {summary.gave_up}" for summary in summaries if summary.gave_up]
    if observed.experts.alive < observed.experts.total:
        problems.append(f"only {observed.experts.alive} of {observed.experts.total} experts were served at the end")
    for summary in summaries:
        first, last = summary.train_bits_per_byte_first, summary.train_bits_per_byte_last
        if first is None or last is None or not last < first:
            problems.append(f"training bits per byte did not fall: {first} at first, {last} at last")
        elif summary.gave_up is None and not (summary.val_bits_per_byte or math.inf) < first:
            problems.append(f"held-out text costs {summary.val_bits_per_byte} bits per byte, not less than at first")
    return problems


def _wall_s(summaries: Sequence[TrainerSummary]) -> float:
    first = min((summary.first_step_unix_s for summary in summaries), default=0.0)
    return max((summary.last_step_unix_s for summary in summaries), default=0.0) - first


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def in_words(report: dict[str, Any]) -> str:
    """The verdict table."""
    calls, pairs, backwards, experts = report["calls"], report["pairs"], report["backwards"], report["experts"]
    first, last = _bits(report["train_bits_per_byte_first"]), _bits(report["train_bits_per_byte_last"])
    lost = _why(report["lost_by_reason"])
    rows = [
        ("steps", f"{report['steps']} ({report['steps_skipped']} skipped) in {report['wall_s']:.0f} s"),
        ("tokens", f"{report['tokens']:,} trained, {report['tokens_per_s']:,.0f} per second"),
        ("bits per byte", f"{first} -> {last}"),
        ("on held-out text", _bits(report["val_bits_per_byte"])),
        ("calls", f"{calls.get('answered', 0):,} of {calls.get('sent', 0):,} answered"),
        ("pairs", f"{pairs.get('answered', 0):,} of {pairs.get('sent', 0):,} answered{lost}"),
        ("backwards", f"{backwards.get('applied', 0):,} of {backwards.get('sent', 0):,} applied"),
        ("traffic", f"{_mib(report['bytes_up'])} up, {_mib(report['bytes_down'])} down"),
        ("", f"{report['bytes_per_token']:,.0f} bytes per token"),
        ("experts", f"{experts['alive']} of {experts['total']} alive at the end"),
        ("", f"{experts['restored']} restored, {experts['reinitialised']} begun afresh"),
        ("kills", f"{report['kills']}"),
        *(("problem", problem) for problem in report["problems"]),
        ("verdict", report["verdict"]),
    ]
    return "\n".join(f"  {name:<17} {value}" for name, value in rows)


def _bits(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _mib(size_bytes: int) -> str:
    return f"{size_bytes / 2**20:,.1f} MiB"


def _why(lost_by_reason: dict[str, int]) -> str:
    reasons = [f"{count:,} {reason}" for reason, count in lost_by_reason.items() if count]
    return f" (lost: {', '.join(reasons)})" if reasons else ""
