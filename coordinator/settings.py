"""What a coordinator's owner decides: which run to start, where to listen. The run itself is the manifest's."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, model_validator

from peer.settings import STATE_HOME, Address, Folder, JoinAddresses, LocalModel


class CoordinatorSettings(LocalModel):
    """`swarmoe coordinator`"""

    preset: Annotated[str, Field(title="NAME")] = "demo"
    """The run to start, by name; `swarmoe config show --presets` lists them."""
    run: Annotated[Path | None, Field(title="FILE.toml")] = None
    """The run to start, as a file; instead of a preset."""
    listen: Address = "0.0.0.0:4700"
    """Where joiners find the swarm."""
    http: Address = "127.0.0.1:8080"
    """Where the dashboard is: /, /api/state, /metrics, /healthz, /events."""
    state_dir: Folder = STATE_HOME / "coordinator"
    """The owner's key and the signed run."""

    @model_validator(mode="after")
    def _one_run(self) -> "CoordinatorSettings":
        if self.run is not None and "preset" in self.model_fields_set:
            raise ValueError("preset and run both say which run to start; give one")
        return self


class StatusSettings(LocalModel):
    """`swarmoe status`"""

    join: Annotated[JoinAddresses, Field(min_length=1)]
    """Anyone already in the swarm; KEY pins who must answer there. May be given several times."""
    timeout_s: Annotated[float, Field(gt=0, le=600, title="SECONDS")] = 15.0
    """How long to try before giving up."""
