"""What our DHT node stores for others, and believes of others: sealed records of its own run, nothing else.

Pure but for the clock it is given; `dht_node` plugs it into hivemind as its record validator.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Callable

import msgpack

from experts.uid import RunId
from peer.envelope import Rejection, open_envelope
from peer.record_keys import RecordKeys
from peer.records import Kind, Signed

_REMEMBERED = 4096


class RecordGuard:
    """hivemind asks it for every record that another node stores here or answers with."""

    def __init__(self, run_id: RunId, keys: RecordKeys, now_unix_s: Callable[[], float]) -> None:
        self._run_id = run_id
        self._keys = keys
        self._now_unix_s = now_unix_s
        # hivemind hands over the SHA-1 that places a key in the DHT, not the key.
        self._kinds: dict[bytes, tuple[Kind, bytes]] = {
            hashlib.sha1(key).digest(): (kind, key) for key, kind in keys.kinds().items()
        }
        self._accepted: OrderedDict[bytes, None] = OrderedDict()

    def accepts(
        self, *, key_sha1: bytes, subkey_msgpack: bytes, value_msgpack: bytes, expires_at_unix_s: float
    ) -> bool:
        """Accepts what is only expired: a dictionary may age on its way, and hivemind drops such items itself."""
        kind, key = self._kinds.get(key_sha1, (None, b""))
        subkey, value = _unpack(subkey_msgpack), _unpack(value_msgpack)
        if kind is None or not isinstance(subkey, str) or not isinstance(value, bytes):
            return False
        if self._keys.of_record(kind, subkey) != key:
            return False
        seen = hashlib.sha256(repr((kind, subkey, expires_at_unix_s)).encode() + value).digest()
        if seen not in self._accepted:  # whatever was acceptable once stays so until it expires
            if not self._is_acceptable(value, kind, subkey, expires_at_unix_s):
                return False
            self._accepted[seen] = None
            if len(self._accepted) > _REMEMBERED:
                self._accepted.popitem(last=False)
        return True

    def _is_acceptable(self, value: bytes, kind: Kind, subkey: str, expires_at_unix_s: float) -> bool:
        now_unix_s = self._now_unix_s()
        opened = open_envelope(value, kind=kind, subkey=subkey, run_id=self._run_id, now_unix_s=now_unix_s)
        if isinstance(opened, Signed):
            return opened.expires_at_unix_s == expires_at_unix_s
        return opened is Rejection.EXPIRED and expires_at_unix_s <= now_unix_s


def _unpack(data: bytes) -> object:
    """None for what is not msgpack. Plain types only: hivemind's own extensions stay unread."""
    try:
        return msgpack.unpackb(data)
    except (ValueError, msgpack.UnpackException):
        return None
