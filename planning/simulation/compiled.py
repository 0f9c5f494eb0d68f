"""Compilation of the numeric kernels."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, TypeVar, cast

numba: Any
try:
    numba = import_module("numba")
except ImportError:  # without the planning extra the kernels are interpreted: equal results, far slower
    numba = None

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile to machine code at the first call, and keep that on disk for later processes.

    Compiled code runs beside other threads: it holds no lock of the interpreter.
    Arithmetic stays IEEE: nothing is reassociated, so results equal those of the interpreted function.
    """
    if numba is None:
        return function
    return cast(Function, numba.njit(cache=True, nogil=True, error_model="numpy")(function))


def inlined(function: Function) -> Function:
    """`compiled`, copied into every caller: for what is called per request and takes many arrays."""
    if numba is None:
        return function
    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))
