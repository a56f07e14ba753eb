"""hivemind's DHT without hivemind's face. Imported by the DHT process and nowhere else.

`import hivemind` runs package files that import torch, the averager and hivemind.moe: 3.4 s and 120 MB, measured, none
of which the DHT uses. With empty packages in their place the same modules load in 0.5 s and 37 MB. Afterwards the rest
of hivemind cannot be imported in this process, which is why only a process of its own may do this.
"""

import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType


def _empty_package(name: str, folder: Path) -> ModuleType:
    package = ModuleType(name)
    package.__path__ = [str(folder)]
    sys.modules[name] = package
    return package


if "hivemind" in sys.modules:
    raise ImportError("hivemind is imported already; its DHT alone needs a process of its own")
_spec = PathFinder.find_spec("hivemind")
if _spec is None or _spec.origin is None:
    raise ImportError("hivemind is not installed; run: pip install hivemind==1.1.12")
_root = Path(_spec.origin).parent
_empty_package("hivemind", _root)
_empty_package("hivemind.dht", _root / "dht")
_utils = _empty_package("hivemind.utils", _root / "utils")

from hivemind.utils import logging, serializer, timed_storage  # noqa: E402

# What the DHT's modules expect to find on the package itself.
for _name, _home in {
    "get_logger": logging,
    "MSGPackSerializer": serializer,
    "SerializerBase": serializer,
    "get_dht_time": timed_storage,
}.items():
    setattr(_utils, _name, getattr(_home, _name))

from hivemind.dht.node import DHTNode  # noqa: E402
from hivemind.dht.protocol import ValidationError  # noqa: E402
from hivemind.dht.storage import DictionaryDHTValue  # noqa: E402
from hivemind.dht.validation import DHTRecord, RecordValidatorBase  # noqa: E402
from hivemind.p2p import P2P, P2PDaemonError, PeerID  # noqa: E402
from hivemind.p2p.p2p_daemon_bindings.utils import ControlFailure  # noqa: E402
from hivemind.utils.multiaddr import Multiaddr  # noqa: E402
from hivemind.utils.timed_storage import ValueWithExpiration  # noqa: E402

P2PD_PATH = _root / "hivemind_cli" / "p2pd"

__all__ = [
    "P2P",
    "P2PD_PATH",
    "ControlFailure",
    "DHTNode",
    "DHTRecord",
    "DictionaryDHTValue",
    "Multiaddr",
    "P2PDaemonError",
    "PeerID",
    "RecordValidatorBase",
    "ValidationError",
    "ValueWithExpiration",
]
