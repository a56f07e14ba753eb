"""Keeps freed memory in the process. glibc hands large freed blocks back to the kernel, which zeroes their pages again
when the next step asks for as much: at 16,384 experts that was half of what the router cost. Memory stays at its peak.
"""

import ctypes

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_NEVER_TRIM_BYTES = 1 << 30
_LARGEST_MMAP_THRESHOLD_BYTES = 32 << 20
"""glibc takes no more; larger blocks go back as before."""


def keep_freed_memory() -> bool:
    """For the whole process, from its first steps on; False where the allocator is not glibc's."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(
        mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES) and mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD_BYTES)
    )
