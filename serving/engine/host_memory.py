"""What the system is told about the pages of large tensors on the CPU; it may be deaf."""

from __future__ import annotations

import ctypes
import mmap
from functools import cache

from torch import Tensor

_MADV_POPULATE_WRITE = 23  # of Linux since 5.14


def fill_by_large_pages(tensor: Tensor) -> None:
    """For memory that fills by gigabytes: a fault for every 4 KiB of it would cost more than what is done with it."""
    _advise(tensor, mmap.MADV_HUGEPAGE)


def populate(tensor: Tensor) -> None:
    """Take the memory now: the first to write there would wait until the system has cleared it."""
    _advise(tensor, _MADV_POPULATE_WRITE)


def give_back(tensor: Tensor) -> None:
    """Return the memory now; what was in it is void. Other threads run meanwhile: while the framework frees
    gigabytes it holds the interpreter, a tenth of a second for each.
    """
    _advise(tensor, mmap.MADV_DONTNEED)


def _advise(tensor: Tensor, advice: int) -> None:
    """Advice on the whole pages of a contiguous tensor."""
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    size = (tensor.data_ptr() + tensor.nbytes - start) // mmap.PAGESIZE * mmap.PAGESIZE
    if size > 0:
        _libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)


@cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
