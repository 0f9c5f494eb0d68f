"""What the kernel says of worker processes that no longer speak for themselves."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

_EXITING = 0x4  # PF_EXITING of the kernel's process flags
_LOOKS = 2  # in a row; what is gone by the next look was nothing


class StandstillWatch:
    """Finds the processes that have stopped or are ending; a device may take seconds to let go of one."""

    def __init__(self) -> None:
        self._seen: dict[int, int] = {}

    def look(self, pids: Mapping[int, int]) -> Iterator[tuple[int, int, str]]:
        """Each worker by index whose process stands still at two looks in a row, with its pid and why; once."""
        reasons = {pid: standstill(pid) for pid in pids.values()}
        self._seen = {pid: self._seen.get(pid, 0) + 1 for pid, reason in reasons.items() if reason}
        for index, pid in pids.items():
            if self._seen.get(pid) == _LOOKS:
                yield index, pid, reasons[pid]


def standstill(pid: int) -> str:
    """Why a process will do nothing, as the kernel knows it; empty while it may run, or is no more."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
    except OSError:
        return ""
    # The name, in parentheses, may contain anything; what follows it is fixed: state, five ids, flags.
    state, *rest = stat.rpartition(")")[2].split()
    if state in "Tt":
        return "is stopped"
    return "is ending" if int(rest[5]) & _EXITING else ""
