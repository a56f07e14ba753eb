"""A disk that refuses, for as long as a block lasts."""

import resource
from collections.abc import Generator
from contextlib import contextmanager


@contextmanager
def largest_file_bytes(limit: int) -> Generator[None]:
    """A disk that is full after `limit` bytes: writes past it fail with EFBIG."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
