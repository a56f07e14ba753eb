"""What the commands of the face itself take; peers, trainers and coordinators bring their own settings."""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from peer.settings import LocalModel, LossyLinkSettings


class OutputSettings(LocalModel):
    """What every command takes."""

    log_format: Literal["console", "json"] = "console"
    """Log lines on stderr for people, or one JSON object each."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """The least that is logged; debug has a line per call."""


class LocalSettings(LossyLinkSettings):
    """`swarmoe local`"""

    peers: Annotated[int, Field(ge=1, le=64, title="N")] = 4
    """Peers to start."""
    trainers: Annotated[int, Field(ge=1, le=16, title="M")] = 1
    """Trainers to start."""
    steps: Annotated[int | None, Field(ge=1, title="S")] = None
    """Training steps; none: as the preset says."""
    preset: Annotated[str, Field(title="NAME")] = "demo"
    """The run; `swarmoe config show --presets` lists them."""
    seed: Annotated[int, Field(ge=0, title="X")] = 0
    """Seed of the run, of the data order, of who is killed and of what is lost."""
    report: Annotated[Path | None, Field(title="FILE.json")] = None
    """Where to write the report; none: only the verdict is printed."""
    data: Annotated[Path | None, Field(title="PATH")] = None
    """A text file, or a folder of them; none: the Austen that ships."""
    kill_every: Annotated[float | None, Field(gt=0, title="SECONDS")] = None
    """Kill one random peer this often; it comes back 5 s later. None in the last 30 s. none: never."""
    dashboard: bool = True
    """Say where the coordinator's page is."""
    nat: bool = False
    """Carry every peer through a relay (not built yet)."""

    @field_validator("nat")
    @classmethod
    def _not_built(cls, value: bool) -> bool:
        if value:
            raise ValueError("not built yet")
        return value
