"""How much faster than hivemind.moe is a remote expert, and a layer of them, on the same machine with the same experts?

Both contestants run at once as processes of their own and take turns; a figure is the ratio of their medians, their
seconds over ours: above 1 we are faster. A round is forward and backward, with D 256, and every expert takes a step
after it: plain SGD, theirs with rate 0, ours with rate 1e-12, which writes the weights all the same. The experts are
hivemind's, on our side as kinds of ours with the same maths (`versus/kinds.py`). Each side computes with one thread.

- `nop_R`: one expert that copies its R rows, fp32 both ways, one client. What bounds it: calls, then bytes.
- `ffn_R`: one feed-forward expert (H 1024), fp32, four clients with R rows each. What bounds it: calls, then FLOPs.
- `layer_*`: 2048 tokens, top 2 of 16 such experts, our router on both sides, ours with a run's default codec.
  `vs_best` is one `RemoteExpert` call per expert, all at once, there and back, in fp16, its fastest codec here
  (`--full` tries fp32 as well and takes the faster; its 8-bit codecs do not work with numpy 2.4). `vs_documented` is
  `RemoteMixtureOfExperts`, one call per token and expert; the quick run gives it 256 tokens and multiplies by 8.
  `layer_bound`, of `--full` alone, has our layer with its experts in process, on one thread: what `vs_best` would be
  without any network.

A round of theirs that fails (streams above 2 MiB lose their tail now and then) is counted and left out.
"""

import argparse
import json
import signal
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from benchmarks.versus.contest import Contestant, Turn, TurnFailed, contestant

LAYER_TOKENS = 2048
DOCUMENTED_TOKENS = 256
"""In a quick run."""


@dataclass(frozen=True)
class Way:
    """One side of a comparison: a contestant's arguments, and what it does in its turn."""

    arguments: tuple[str, ...]
    turn: Turn
    scale: float = 1.0
    """Seconds are multiplied by this."""


@dataclass(frozen=True)
class Match:
    """A figure: ours against the best of theirs."""

    figure: str
    ours: Way
    theirs: tuple[Way, ...]
    turns: int


def matches(*, full: bool) -> list[Match]:
    """What is measured, in order. Those with the same contestants follow each other."""
    turns, turns_of_long = (15, 15) if full else (3, 2)
    single = [("nop", 1, 1, 20), ("nop", 64, 1, 15), ("nop", 1024, 1, 5), ("nop", 4096, 1, 3)]
    single += [("ffn", 32, 4, 8), ("ffn", 256, 4, 3), ("ffn", 2048, 4, 1)]
    found: list[Match] = []
    for scene, rows, clients, rounds in single:
        turn = Turn("round", rows, clients, rounds)
        num_turns = turns if rounds > 1 else turns_of_long
        found.append(Match(f"{scene}_{rows}", Way((scene,), turn), (Way((scene, "NONE"), turn),), num_turns))
    layer = Turn("round", LAYER_TOKENS, 1, 2)
    best = tuple(Way(("layer", compression), layer) for compression in ("FLOAT16", "NONE")[: 2 if full else 1])
    found.append(Match("layer_vs_best", Way(("layer",), layer), best, turns_of_long))
    if full:
        in_process = Way(("layer",), Turn("in_process", LAYER_TOKENS, 1, 2))
        found.append(Match("layer_bound", in_process, best[:1], turns))
    tokens = LAYER_TOKENS if full else DOCUMENTED_TOKENS
    documented = Way(("layer", "FLOAT16"), Turn("documented", tokens, 1, 1), scale=LAYER_TOKENS / tokens)
    found.append(Match("layer_vs_documented", Way(("layer",), layer), (documented,), turns=3 if full else 1))
    return found


@dataclass(frozen=True)
class Outcome:
    """Median seconds of a round on either side."""

    ours_s: float
    theirs_s: float
    failed: int
    """Turns of theirs without a time."""

    @property
    def ratio(self) -> float:
        return self.theirs_s / self.ours_s


def play(match: Match, ours: Contestant, theirs: Sequence[Contestant]) -> Outcome:
    """Everybody in turn, `turns` times. RuntimeError when a side never got through."""
    sides = [(ours, match.ours), *zip(theirs, match.theirs, strict=True)]
    seconds: list[list[float]] = [[] for _ in sides]
    failed = 0
    for _ in range(match.turns):
        for taken, (player, way) in zip(seconds, sides, strict=True):
            try:
                taken.append(way.scale * player.take(way.turn))
            except TurnFailed:
                if player is ours:
                    raise
                failed += 1
    medians = [statistics.median(taken) if taken else float("inf") for taken in seconds]
    return Outcome(medians[0], min(medians[1:]), failed)


def contest(plan: Sequence[Match]) -> Iterator[tuple[str, Outcome]]:
    """Each figure as soon as it is known. All contestants live until the end."""
    wanted = [("benchmarks.versus.ours", *match.ours.arguments) for match in plan]
    wanted += [("benchmarks.versus.theirs", "client", *way.arguments) for match in plan for way in match.theirs]
    with ExitStack() as stack:
        players = {command: stack.enter_context(contestant(*command)) for command in dict.fromkeys(wanted)}
        for player in players.values():
            player.until_ready()
        for match in plan:
            ours = players["benchmarks.versus.ours", *match.ours.arguments]
            theirs = [players["benchmarks.versus.theirs", "client", *way.arguments] for way in match.theirs]
            yield match.figure, play(match, ours, theirs)


def _unwind(number: int, _: object) -> None:
    """End as Ctrl+C does: with it the contestants end."""
    sys.exit(128 + number)


def main(argv: list[str] | None = None, say: Callable[[str], object] = print) -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument(
        "--full", action="store_true", help="many more turns, the layer's bound, the documented way with all tokens"
    )
    parser.add_argument("--only", default="", help="only figures that start so, for example nop")
    options = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, _unwind)
    plan = [match for match in matches(full=options.full) if match.figure.startswith(options.only)]
    ratios: dict[str, float] = {}
    if not options.json:
        say(f"{'':<20} {'theirs, ms':>11} {'ours, ms':>9} {'ratio':>7}")
    for figure, outcome in contest(plan):
        ratios[figure] = round(outcome.ratio, 3)
        if not options.json:
            failed = f"   {outcome.failed} of their turns failed" if outcome.failed else ""
            line = f"{figure:<20} {1e3 * outcome.theirs_s:11.2f} {1e3 * outcome.ours_s:9.2f} {outcome.ratio:7.2f}"
            say(line + failed)
    if options.json:
        say(json.dumps(ratios))


if __name__ == "__main__":
    main()
