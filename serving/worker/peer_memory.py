"""Tensors of other processes' GPUs on this host, read where they are.

A tensor is shown by a `Sight`: a handle of the allocation that it is part of, and how it lies there. Whoever
sees it may read as long as the owner keeps it. The framework's own way of sharing counts its readers, and
keeps for ever what one of them died with; here orders say who reads when, and nothing is counted.
"""

from __future__ import annotations

import ctypes
import weakref
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import msgspec
import torch
from torch import Tensor

_HANDLE_BYTES = 64
_LAZY_PEER_ACCESS = 1  # the only flag there is; without it nothing is opened


class Sight(msgspec.Struct, frozen=True, array_like=True):
    """What a reader has to know of a tensor. `offset` is in bytes, `strides` are in elements."""

    handle: bytes
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Foreign:
    """A tensor in another process's memory, as kernels see it: an address here, and how it lies."""

    address: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def data_ptr(self) -> int:
        """What the compiler of kernels asks every argument for that is a tensor."""
        return self.address

    def stride(self, dim: int) -> int:
        """In elements."""
        return self.strides[dim]

    def narrow(self, dim: int, start: int, length: int) -> Foreign:
        """A part of it."""
        shape = (*self.shape[:dim], length, *self.shape[dim + 1 :])
        return replace(self, address=self.address + start * self.strides[dim] * self.dtype.itemsize, shape=shape)


Seen = Foreign | Tensor
"""What a rank sees of another one: on a GPU its memory as it is."""


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


class PeerMemory:
    """What this process shows and what it has opened, on one GPU, until nobody refers to it any more: whoever copies
    does, and what is being read must not be closed. Raises `RuntimeError` if the driver refuses.
    """

    def __init__(self, device: torch.device) -> None:
        self._handles: dict[int, bytes] = {}  # by the base of an allocation
        self._opened: dict[bytes, int] = {}
        weakref.finalize(self, _close, device, self._opened).atexit = False

    def show(self, tensor: Tensor) -> Sight:
        """A tensor of this GPU, for others; it has to stay until they have read it."""
        base, size, pointer = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint64(tensor.data_ptr())
        _call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        if base.value not in self._handles:
            handle = _Handle()
            _call("cuIpcGetMemHandle", ctypes.byref(handle), base)
            self._handles[base.value] = bytes(handle)
        offset = pointer.value - base.value
        return Sight(self._handles[base.value], offset, tuple(tensor.shape), tuple(tensor.stride()))

    def see(self, sight: Sight, dtype: torch.dtype) -> Foreign:
        """A tensor that another process shows. An allocation is opened once, which takes a millisecond or ten."""
        if sight.handle not in self._opened:
            base = ctypes.c_uint64()
            handle = _Handle.from_buffer_copy(sight.handle)
            _call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            self._opened[sight.handle] = base.value
        return Foreign(self._opened[sight.handle] + sight.offset, dtype, sight.shape, sight.strides)


def _close(device: torch.device, opened: dict[bytes, int]) -> None:
    """Let go of what was opened: as long as it is, its owner cannot return it to the system."""
    with torch.cuda.device(device):
        for base in opened.values():
            _call("cuIpcCloseMemHandle", ctypes.c_uint64(base))


def _call(name: str, *arguments: Any) -> None:
    """A function of the driver, in the context of the calling thread's device."""
    if status := getattr(_driver(), name)(*arguments):
        raise RuntimeError(f"{name} failed with status {status}")


@cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")
