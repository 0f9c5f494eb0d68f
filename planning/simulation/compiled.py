"""Compilation of the numeric kernels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Function = TypeVar("Function", bound=Callable[..., Any])


def compiled(function: Function) -> Function:
    """Compile to machine code at the first call, and keep that on disk for later processes.

    Arithmetic stays IEEE: nothing is reassociated, so results equal those of the interpreted function.
    """
    return cast(Function, numba.njit(cache=True, error_model="numpy")(function))


def inlined(function: Function) -> Function:
    """`compiled`, copied into every caller: for what is called per request and takes many arrays."""
    return cast(Function, numba.njit(inline="always", error_model="numpy")(function))
