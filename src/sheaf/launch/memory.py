"""What a worker frees stays its own: asking the system for the same memory in every step costs as much as using it."""

import contextlib
import ctypes
import os
import sys

# <malloc.h> of glibc
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT_BYTES = 2**30  # freed at the end of the heap, before any is given back
LARGE_BYTES = 32 * 2**20  # from here on a piece comes from the system and goes back to it; glibc allows no more


def keep() -> None:
    """Tell glibc so, for this process; nothing elsewhere, or where the user has set how memory is taken.

    Gradients and activations come and go in each step. glibc gives the end of its heap back as soon as it is free, and
    then each page comes anew, as zeros.
    """
    chosen = any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in os.environ)
    if sys.platform != "linux" or chosen:
        return
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(MMAP_THRESHOLD, LARGE_BYTES)
        mallopt(TRIM_THRESHOLD, KEPT_BYTES)
