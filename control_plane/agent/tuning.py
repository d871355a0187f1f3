"""What a worker asks of its interpreter, its C library and the kernel, so that moving KV does not slow its engine down.

Each is a setting of the whole process, made once, by the process's own driver. None changes what is computed.
"""

import ctypes
import gc
import os
import sys
from collections.abc import Collection

SWITCH_INTERVAL_S = 0.0005  # Python's default of 5 ms is a stall per message beside a busy engine thread

# <malloc.h>. What is freed stays ours up to KEEP_BYTES, and nothing smaller than MMAP_BYTES has pages of its own.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
KEEP_BYTES = 256 << 20
MMAP_BYTES = 32 << 20  # glibc takes no more


def settle_interpreter() -> None:
    """Threads take turns often; buffers of a frame's size are recycled."""
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    keep_freed_memory()


def keep_freed_memory() -> None:
    """Frames come and go by the megabyte. glibc would give each back to the kernel and ask for it again, page by page:
    an encode job took 600 us so, and takes 150. Other C libraries have no such call, and are left as they are."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_M_TRIM_THRESHOLD, KEEP_BYTES)
    mallopt(_M_MMAP_THRESHOLD, MMAP_BYTES)


def leave_to_engine(engine_cores: Collection[int]) -> None:
    """Keep the calling thread, and those it starts from now on, off the cores that our own engine computes on, if any
    others are left. A loop that floats is woken by the engine and so, often, on the engine's core."""
    if hasattr(os, "sched_setaffinity") and (others := os.sched_getaffinity(0) - set(engine_cores)):
        os.sched_setaffinity(0, others)


def exempt_from_collection() -> None:
    """What exists now (a loaded model: some hundred thousand objects) is never garbage: do not look through it again
    and again, with the interpreter's lock held."""
    gc.collect()
    gc.freeze()
