"""Where requests with KV go on."""

from __future__ import annotations

from data.layout import Device, ParallelConfig
from planning.simulation.batching import BatchLimits, Job
from planning.simulation.lines import Line
from planning.simulation.seating import join, seat
from planning.step_laws import StepLaw


def _line(number: int, blocks: int = 50) -> Line:
    config = ParallelConfig(1, 1, 1, 4)
    return Line(number, config, (Device("i0", 0),), StepLaw((1.0, 0, 0, 0, 0, 0, 0)), BatchLimits(4, 64, 16, blocks))


def _jobs(count: int, cached: int = 20) -> list[Job]:
    return [Job(key, prompt=20, most=10, output=1, cached=cached) for key in range(count)]


def _keys(line: Line) -> list[int]:
    return [job.key for job in line.batcher.running]


def test_requests_follow_their_replica_but_no_heir_takes_more_than_its_share() -> None:
    first, second = _line(11), _line(12)
    jobs = _jobs(6)
    origin = {job: 1 if job.key < 4 else 2 for job in jobs}
    assert seat(jobs, [first, second], [(1,), (2,)], origin) == []
    assert (_keys(first), _keys(second)) == ([0, 1, 2], [3, 4, 5])


def test_who_finds_no_blocks_is_left() -> None:
    line = _line(1, blocks=5)  # two blocks each, and one to grow for everybody who will need it
    left = seat(_jobs(3), [line], [()], {})
    assert _keys(line) == [0, 1]
    assert [job.key for job in left] == [2]
    assert line.batcher.free == 1


def test_requests_join_the_emptiest_running_replicas_with_blocks_to_spare() -> None:
    busy, idle = _line(1), _line(2)
    for job in _jobs(3):
        busy.batcher.add(job)
    moved = [Job(key, prompt=20, most=10, output=1, cached=20) for key in range(10, 15)]
    assert join(moved, [busy, idle]) == []
    assert len(_keys(idle)) == 4  # three until both hold as many, then in turn
    full = _line(3, blocks=5)
    assert join(moved[:1], [full]) == moved[:1]
    assert join(moved[:1], []) == moved[:1]
