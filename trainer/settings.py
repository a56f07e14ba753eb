"""What a trainer's owner decides: which swarm, how long, which text, which folder. The rest is the manifest's."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from peer.settings import STATE_HOME, Device, Folder, JoinAddresses, LocalModel, LossyLinkSettings


class TrainSettings(LossyLinkSettings):
    """`swarmoe train`"""

    join: Annotated[JoinAddresses, Field(min_length=1)]
    """Anyone already in the swarm; KEY pins who must answer there. May be given several times."""
    steps: Annotated[int | None, Field(ge=1, title="S")] = None
    """Training steps in all, those before a resume included; none: as the run suggests."""
    data: Annotated[Path | None, Field(title="PATH")] = None
    """A text file, or a folder of them; none: the Austen that ships."""
    data_shard: Annotated[int | None, Field(ge=0, lt=1 << 32, title="N")] = None
    """Which trainer this is to the data order; none: told from its identity, so that no two draw the same windows."""
    device: Device = "auto"
    """What the trunk runs on: the CPU, for now (cuda and mps are not built yet). Experts run where their peers are."""
    checkpoint_dir: Folder = STATE_HOME / "trainer"
    """Identity, checkpoints and metrics.jsonl."""
    resume: bool = False
    """Go on from the newest checkpoint in the checkpoint folder; begin when there is none yet."""
    link_seed: Annotated[int, Field(ge=0, title="X")] = 0
    """Seed of what is drawn for emulated links."""


class GenerateSettings(LocalModel):
    """`swarmoe generate`"""

    join: Annotated[JoinAddresses, Field(min_length=1)]
    """Anyone already in the swarm; KEY pins who must answer there. May be given several times."""
    checkpoint_dir: Folder = STATE_HOME / "trainer"
    """Where the trunk comes from; the experts are asked live."""
    prompt: Annotated[str, Field(min_length=1, title="TEXT")] = "It is a truth universally acknowledged, that "
    """What the text begins with."""
    length: Annotated[int, Field(ge=1, le=100_000, title="BYTES")] = 200
    """Bytes to sample after the prompt."""
    temperature: Annotated[float, Field(gt=0, le=10, title="T")] = 0.8
    """Below 1 the likely gets likelier; above 1 everything gets possible."""
    seed: Annotated[int, Field(ge=0, title="X")] = 0
    """Seed of the sampling."""
