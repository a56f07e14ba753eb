"""`swarmoe generate`: text from the live swarm. The trunk is a trainer's newest checkpoint, the experts are asked."""

import json
import time

import structlog

from peer.device import limit_compute_threads
from peer.errors import TooFewExperts
from trainer.assembly import build_model
from trainer.checkpoint import load_newest
from trainer.sampling import sample_text
from trainer.scope import evaluating
from trainer.settings import GenerateSettings
from trainer.swarm import join

log = structlog.get_logger(__name__)

WAIT_FOR_EXPERTS_S = 20.0


def run_generate(settings: GenerateSettings, *, as_json: bool) -> int:
    """Print the prompt and what follows it; returns the exit code. Raises SwarmError."""
    limit_compute_threads()
    with join(*settings.join) as swarm:
        state = load_newest(settings.checkpoint_dir, run=swarm.manifest)
        model = build_model(swarm.manifest, swarm.experts, swarm.view)
        model.load_state_dict(dict(state.trunk))
        if not swarm.wait_for_experts(timeout_s=WAIT_FOR_EXPERTS_S):
            uncovered = swarm.snapshot().uncovered(swarm.manifest.uids())
            if len(uncovered) == len(swarm.manifest.uids()):
                raise TooFewExperts("nobody serves any expert of this run; start peers and try again")
            log.warning("generate.experts_missing", uncovered=[str(uid) for uid in uncovered])
        started_s = time.monotonic()
        text = sample_text(
            model,
            settings.prompt,
            num_bytes=settings.length,
            temperature=settings.temperature,
            seed=settings.seed,
            eval_calls=lambda: evaluating(swarm.manifest.wire.step_timeout_s),
        )
        seconds = time.monotonic() - started_s
    if as_json:
        print(json.dumps({"text": text, "step": state.step, "seconds": round(seconds, 3)}))
    else:
        print(text)
    return 0
