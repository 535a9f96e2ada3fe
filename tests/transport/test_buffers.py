"""Memory that was freed is kept for the next message, and not more of it than that."""

from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import ctypes, resource
from p2pcodistill.transport.buffers import LARGEST_BUFFER_BYTES, MAX_KEPT_BYTES, keep_freed_buffers

def resident_bytes():
    return int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()

def count_faults(num_bytes):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        ctypes.memset(buffer := malloc(num_bytes), 1, num_bytes)
        free(buffer)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

libc = ctypes.CDLL(None)
malloc, free = libc.malloc, libc.free
malloc.restype, malloc.argtypes, free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
assert keep_freed_buffers()
num_pages = (4 << 20) // resource.getpagesize()
count_faults(4 << 20)
assert count_faults(4 << 20) < num_pages / 2, "the same pages again"
buffers = [0] * 200
# Holes for what the interpreter allocates meanwhile: above the buffers, it would keep them from being returned.
holes = [malloc(16_384) for _ in range(100)]
guards = [malloc(64) for _ in holes]
for hole in holes[::2]:
    free(hole)
held_bytes = resident_bytes()
for index in range(len(buffers)):
    buffers[index] = malloc(1 << 20)
    ctypes.memset(buffers[index], 1, 1 << 20)
assert resident_bytes() > held_bytes + (190 << 20)
for buffer in buffers:
    free(buffer)
assert resident_bytes() < held_bytes + MAX_KEPT_BYTES + LARGEST_BUFFER_BYTES
"""


def test_freed_memory_is_kept_within_bounds() -> None:
    ended = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
