import random

import pytest

from benchmarks.growth import MEMORY_TOLERANCE, Sample, Trend, growth, trends

MB = 1 << 20


def samples(uss: list[int], descriptors: list[int], threads: list[int], process: str = "controller") -> list[Sample]:
    return [
        Sample(10 * (index + 1), process, *values)
        for index, values in enumerate(zip(uss, descriptors, threads, strict=True))
    ]


def verdicts(found: list[Trend]) -> dict[str, bool]:
    return {trend.quantity: trend.flat for trend in found}


def test_noise_and_a_warm_up_are_no_leak() -> None:
    source = random.Random(3)
    uss = [(100 if index > 9 else 50 + 5 * index) * MB + source.randrange(MB) for index in range(50)]
    counts = [20 + (index % 7 == 0) * 6 for index in range(50)]
    assert all(verdicts(trends(samples(uss, counts, counts))).values())


def test_a_leak_of_one_descriptor_or_thread_is_found() -> None:
    steps = [30 + index // 20 for index in range(50)]
    flat = [100 * MB] * 50
    assert verdicts(trends(samples(flat, steps, [8] * 50))) == {
        "uss_bytes": True,
        "descriptors": False,
        "threads": True,
    }
    assert not verdicts(trends(samples(flat, [9] * 50, steps)))["threads"]


def test_memory_may_grow_by_less_than_the_tolerance() -> None:
    span = 39  # samples after the warm-up, less one
    for share, flat in ((0.5, True), (1.5, False)):
        uss = [int(100 * MB * (1 + share * MEMORY_TOLERANCE * (index - 10) / span)) for index in range(50)]
        assert verdicts(trends(samples(uss, [9] * 50, [9] * 50)))["uss_bytes"] is flat


def test_an_outlier_moves_the_slope_little() -> None:
    values = [5.0] * 40
    values[-1] = 500.0
    assert growth([float(index) for index in range(40)], values) == 0.0


def test_every_process_has_its_own_trend() -> None:
    leaking = samples([MB] * 20, list(range(20)), [4] * 20, "i0/worker")
    found = trends([*samples([MB] * 20, [9] * 20, [4] * 20), *leaking])
    assert [str(trend).split(":")[0] for trend in found if not trend.flat] == ["i0/worker"]
    assert "descriptors" in str(next(trend for trend in found if not trend.flat))


def test_too_few_samples_say_nothing() -> None:
    with pytest.raises(ValueError, match="says nothing"):
        trends(samples([MB] * 2, [9] * 2, [4] * 2))
