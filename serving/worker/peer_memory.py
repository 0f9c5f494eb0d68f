"""Tensors of other processes' GPUs on this host, read where they are.

A tensor is shown by a `Sight`: a handle of the allocation that it is part of, and how it lies there. Whoever
sees it may read as long as the owner keeps it. The framework's own way of sharing counts its readers, and
keeps for ever what one of them died with; here orders say who reads when, and nothing is counted.
"""

from __future__ import annotations

import contextlib
import ctypes
import weakref
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


class _Handle(ctypes.Structure):
    _fields_ = (("reserved", ctypes.c_ubyte * _HANDLE_BYTES),)


class PeerMemory:
    """What this process shows and what it has opened, on one GPU, until nobody refers to it any more: whoever copies
    does, and what is being read must not be closed. Raises `RuntimeError` if the driver refuses.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._driver = device, _Driver(device.index or 0)
        self._handles: dict[int, bytes] = {}  # by the base of an allocation
        self._opened: dict[bytes, int] = {}
        weakref.finalize(self, _close, self._driver, self._opened).atexit = False

    def show(self, tensor: Tensor) -> Sight:
        """A tensor of this GPU, for others; it has to stay until they have read it."""
        base, size, pointer = ctypes.c_uint64(), ctypes.c_size_t(), ctypes.c_uint64(tensor.data_ptr())
        self._driver.call("cuMemGetAddressRange_v2", ctypes.byref(base), ctypes.byref(size), pointer)
        if base.value not in self._handles:
            handle = _Handle()
            self._driver.call("cuIpcGetMemHandle", ctypes.byref(handle), base)
            self._handles[base.value] = bytes(handle)
        offset = pointer.value - base.value
        return Sight(self._handles[base.value], offset, tuple(tensor.shape), tuple(tensor.stride()))

    def see(self, sight: Sight, dtype: torch.dtype) -> Tensor:
        """A tensor that another process shows, for the device of this one: to kernels and to copies it is memory like
        any other. An allocation is opened once, which takes a millisecond or ten.
        """
        if sight.handle not in self._opened:
            base = ctypes.c_uint64()
            handle = _Handle.from_buffer_copy(sight.handle)
            self._driver.call("cuIpcOpenMemHandle_v2", ctypes.byref(base), handle, ctypes.c_uint(_LAZY_PEER_ACCESS))
            self._opened[sight.handle] = base.value
        return tensor_at(self._opened[sight.handle] + sight.offset, sight, dtype, self._device)


def tensor_at(address: int, sight: Sight, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensor that lies at an address like that of a sight; nobody frees it."""
    last = sum((extent - 1) * stride for extent, stride in zip(sight.shape, sight.strides, strict=True))
    storage: Any = torch._C._construct_storage_from_data_pointer(address, device, (last + 1) * dtype.itemsize)
    return torch.empty(0, dtype=dtype, device=device).set_(storage, 0, sight.shape, sight.strides)


class _Driver:
    """Functions of the driver in the context that the framework uses on a device, whatever thread calls them."""

    def __init__(self, index: int) -> None:
        self._library = ctypes.CDLL("libcuda.so.1")
        self._context = ctypes.c_void_p()
        self._check("cuDevicePrimaryCtxRetain", ctypes.byref(self._context), ctypes.c_int(index))

    def call(self, name: str, *arguments: Any) -> None:
        """Raises `RuntimeError` if it fails."""
        self._check("cuCtxSetCurrent", self._context)
        self._check(name, *arguments)

    def _check(self, name: str, *arguments: Any) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} failed with status {status}")


def _close(driver: _Driver, opened: dict[bytes, int]) -> None:
    """Let go of what was opened: as long as it is, its owner cannot return it to the system."""
    for base in opened.values():
        with contextlib.suppress(RuntimeError):  # the owner may be gone; the others are to be let go of all the same
            driver.call("cuIpcCloseMemHandle", ctypes.c_uint64(base))
