"""`swarmoe version`"""

import json
import platform

import swarmoe
from peer.manifest import PROTOCOL_VERSION
from swarmoe.command_line import Invocation


def start(invocation: Invocation) -> int:
    """Print the version. Also that of the protocol it speaks."""
    if invocation.json:
        print(
            json.dumps(
                {"version": swarmoe.__version__, "protocol": PROTOCOL_VERSION, "python": platform.python_version()}
            )
        )
    else:
        print(f"swarmoe {swarmoe.__version__} (protocol {PROTOCOL_VERSION})")
    return 0
