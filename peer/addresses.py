"""HOST:PORT as people write it; an IPv6 host stands in brackets. Resolves nothing."""

import re

_HOST_PORT = re.compile(r"(?:\[(?P<v6>[0-9A-Fa-f:.]+(?:%[\w.-]+)?)\]|(?P<host>[^\s:/\[\]@?#]+)):(?P<port>\d{1,5})")

MAX_ADDRESS_CHARS = 261
"""A host name of 253 characters, RFC 1035's most, brackets, colon and port."""
_MAX_LABEL_CHARS = 63


def split_address(text: str, *, allow_port_0: bool = False) -> tuple[str, int]:
    """Host without brackets, and port. ValueError says how to write it."""
    match = _HOST_PORT.fullmatch(text) if len(text) <= MAX_ADDRESS_CHARS else None
    if match is None or max(map(len, (match["host"] or "").split("."))) > _MAX_LABEL_CHARS:
        raise ValueError(
            f"{text[:200]!r} is not an address; write HOST:PORT, for example 192.0.2.7:4000 or [2001:db8::7]:4000"
        )
    port = int(match["port"])
    if port > 65535 or (port == 0 and not allow_port_0):
        raise ValueError(f"{text[:200]!r} has no valid port; ports are 1 to 65535")
    return match["v6"] or match["host"], port


def join_address(host: str, port: int) -> str:
    """The inverse of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
