"""Who a member is: an Ed25519 key whose public half, in base32, is the peer id. And that a state folder has one daemon.

Refuses to know what is signed, except that every kind of message has a domain of its own, so that a signature given for
one purpose is worth nothing for another.
"""

import base64
import fcntl
import os
import stat
from enum import StrEnum
from pathlib import Path
from types import TracebackType
from typing import Self

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from peer.errors import BadConfiguration, FolderInUse
from peer.transport import PeerId

KEY_FILE = "identity.key"
LOCK_FILE = "lock"
PUBLIC_KEY_BYTES = 32
PEER_ID_CHARS = 52


class Domain(StrEnum):
    """What a signature is for. A value never changes its meaning."""

    CALL = "call"
    INFO = "info"
    MANIFEST = "manifest"
    RECORD = "record"


class Identity:
    """A private key and what it can do: say who it is, and sign. Any thread may use it."""

    def __init__(self, key: Ed25519PrivateKey) -> None:
        self._key = key
        self.public_key: bytes = key.public_key().public_bytes_raw()
        self.peer_id: PeerId = peer_id_of(self.public_key)

    @classmethod
    def generate(cls) -> Self:
        """A fresh identity that lives as long as the process."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def load_or_create(cls, folder: Path) -> Self:
        """The identity of this state folder, made on first use. Hold the folder's `StateFolder` while calling.

        Raises ValueError with the fix when others can read the key or it is none, OSError when the folder is not ours.
        """
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / KEY_FILE
        if not path.exists():
            _write_private_key(path, Ed25519PrivateKey.generate())
        return cls(_read_private_key(path))

    def sign(self, domain: Domain, *fields: bytes) -> bytes:
        """64 bytes over the domain and the fields, in this order; `verify` takes the same ones."""
        return self._key.sign(_signed_bytes(domain, fields))

    def __repr__(self) -> str:
        return f"Identity({self.peer_id})"


def verify(peer_id: PeerId, signature: bytes, domain: Domain, *fields: bytes) -> bool:
    """Did this member sign these fields for this purpose? False for anything malformed, never raises."""
    try:
        key = Ed25519PublicKey.from_public_bytes(public_key_of(peer_id))
        key.verify(signature, _signed_bytes(domain, fields))
    except (InvalidSignature, ValueError):
        return False
    return True


def peer_id_of(public_key: bytes) -> PeerId:
    """The name of this public key; ValueError unless it has 32 bytes."""
    if len(public_key) != PUBLIC_KEY_BYTES:
        raise ValueError(f"an Ed25519 public key has {PUBLIC_KEY_BYTES} bytes, not {len(public_key)}")
    return PeerId(base64.b32encode(public_key).decode().rstrip("=").lower())


def public_key_of(peer_id: str) -> bytes:
    """The key behind this name; ValueError on anything but the one spelling `peer_id_of` gives it."""
    try:
        public_key = base64.b32decode(f"{peer_id.upper()}====")
    except ValueError as error:  # binascii.Error included
        raise ValueError(f"{peer_id[:64]!r} is not a peer id: {error}") from None
    if len(public_key) != PUBLIC_KEY_BYTES or peer_id_of(public_key) != peer_id:
        raise ValueError(f"{peer_id[:64]!r} is not a peer id: {PEER_ID_CHARS} characters of lower-case base32")
    return public_key


class StateFolder:
    """A folder that one daemon holds, from `__init__` to `close` or to the death of the process.

    The lock is the kernel's (flock), so a killed daemon leaves none behind; the file holds the pid for the message only
    and is never removed: unlinking a lock file lets two daemons hold two files of one name.
    """

    def __init__(self, path: Path) -> None:
        """Make the folder if need be and take it.

        Raises FolderInUse naming the process that has it, BadConfiguration when it cannot be a folder of ours.
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock_fd: int | None = os.open(path / LOCK_FILE, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise BadConfiguration(f"{path} cannot hold our state: {error.strerror}; give another folder") from error
        try:
            fcntl.flock(self._lock_fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock_fd, 32, 0).decode(errors="replace").strip() or "unknown"
            self.close()
            raise FolderInUse(f"{path} is held by process {holder}; stop it, or give this one another folder") from None
        os.ftruncate(self._lock_fd, 0)
        os.pwrite(self._lock_fd, f"{os.getpid()}\n".encode(), 0)

    def identity(self) -> Identity:
        """Of this folder, made on first use. Raises BadConfiguration with the fix."""
        try:
            return Identity.load_or_create(self.path)
        except (ValueError, OSError) as error:
            raise BadConfiguration(str(error)) from error

    def close(self) -> None:
        """Let the next daemon have it. Idempotent."""
        if self._lock_fd is not None:
            os.close(self._lock_fd)
            self._lock_fd = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def _signed_bytes(domain: Domain, fields: tuple[bytes, ...]) -> bytes:
    """Each field after its length, so that no two lists of fields are the same bytes."""
    prefixed = (len(field).to_bytes(8, "big") + field for field in fields)
    return f"swarmoe/v1/{domain.value}\0".encode() + b"".join(prefixed)


def _write_private_key(path: Path, key: Ed25519PrivateKey) -> None:
    """Whole or not at all, and never readable by others, not even for a moment."""
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    unfinished = path.with_suffix(".new")
    unfinished.unlink(missing_ok=True)
    fd = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with os.fdopen(fd, "wb") as file:
        file.write(pem)
        file.flush()
        os.fsync(fd)
    unfinished.rename(path)


def _read_private_key(path: Path) -> Ed25519PrivateKey:
    with path.open("rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        pem = file.read(4096)
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ValueError(f"{path} is open to others (mode {mode:04o}); run: chmod 600 {path}")
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{path} is not a private key; restore it, or move it away for a new identity") from error
    if not isinstance(key, Ed25519PrivateKey):
        raise ValueError(f"{path} is not an Ed25519 key; move it away for a new identity")  # noqa: TRY004
    return key
