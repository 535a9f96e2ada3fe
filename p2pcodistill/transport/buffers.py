"""Memory for messages: libzmq allocates several buffers for each, as large as a chunk, and soon frees them again."""

from __future__ import annotations

import ctypes

LARGEST_BUFFER_BYTES = 8 << 20
"""Above the largest message."""
MAX_KEPT_BYTES = 32 << 20
"""Of each thread's memory that is free."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h


def keep_freed_buffers() -> bool:
    """Let this process keep memory that was freed, within MAX_KEPT_BYTES, rather than return it to the system.

    To map a message's pages anew, touched one by one, takes an eighth of the processor time of a transfer. False where the
    C library has no such setting.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(
        mallopt(_M_MMAP_THRESHOLD, LARGEST_BUFFER_BYTES) and mallopt(_M_TRIM_THRESHOLD, MAX_KEPT_BYTES)
    )
