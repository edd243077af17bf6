"""What the C library's allocator does with memory that a step frees."""

import ctypes

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # as malloc.h numbers them
_KEPT_BYTES = 1 << 30
_AT_ONCE_BYTES = 64 << 20
_LARGEST_BYTES = 32 << 20
"""The largest that glibc takes for this one."""


def keep_freed_memory() -> None:
    """Have the process keep what is freed, up to 1 GiB, for the next step that wants it. Only glibc can be told.

    Otherwise the megabytes of a layer's results are given back and asked for again, layer by layer: in three processes
    of four 15,000 page faults for 1,024 tokens in two layers (0.6B shape), at up to 11 us each on a virtual machine.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_TRIM_THRESHOLD, _KEPT_BYTES)
        mallopt(_TOP_PAD, _AT_ONCE_BYTES)
        mallopt(_MMAP_THRESHOLD, _LARGEST_BYTES)
