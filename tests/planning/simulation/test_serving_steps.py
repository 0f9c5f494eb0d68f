"""Steps on replicas: times by hand, order, and that every request is done once whatever is taken away."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from planning.simulation.serving_steps import Service
from planning.step_costs import MOST_GROUP, StepTimes

TIMES = StepTimes(
    decode_s=np.array([0.0, 0.1, 0.1, 0.12, 0.12]),
    through_s=np.array([0.0, 1.0, 1.2, 1.4, 1.6]),
    slowest_s=np.array([0.0, 0.5, 0.6, 0.7, 0.8]),
)
assert len(TIMES.through_s) == MOST_GROUP + 1


def test_one_request_takes_its_prefill_and_128_steps() -> None:
    service = Service(np.array([3.0]), 1)
    service.start(0, 1.0, TIMES)
    service.advance(100.0)
    assert service.line.done_s[0] == pytest.approx(3.0 + 1.0 + 128 * 0.1)


def test_a_replica_that_starts_late_serves_what_waited() -> None:
    service = Service(np.array([1.0, 2.0]), 1)
    service.start(0, 10.0, TIMES)
    service.advance(100.0)
    assert service.line.done_s[0] >= 10.0 + 1.2 + 128 * 0.1 - 1e-9
    assert service.all_done


def test_requests_go_to_the_replica_with_fewest() -> None:
    service = Service(np.array([1.0, 1.1]), 2)
    for replica in range(2):
        service.start(replica, 0.0, TIMES)
    service.advance(5.0)
    assert service.replicas.held.tolist() == [1, 1]


def test_whole_batches_start_together() -> None:
    service = Service(np.array([0.0, 2.0, 3.0]), 1)
    service.start(0, 0.0, TIMES, whole=True)
    service.advance(100.0)
    first, second, third = service.line.done_s
    assert second == third > first + 128 * 0.1


def test_adopted_requests_keep_their_tokens_and_lost_ones_pay_a_longer_prompt() -> None:
    service = Service(np.array([0.0]), 2)
    service.start(0, 0.0, TIMES)
    service.advance(8.0)
    tokens = int(service.line.tokens[0])
    assert 0 < tokens < 128
    running, waiting = service.stop(0)
    assert (running, waiting) == ([0], [])
    service.start(1, 8.0, TIMES)
    assert service.adopt(1, running, 9.0) == []
    service.advance(9.5)
    assert int(service.line.tokens[0]) > tokens
    service.give_up(1)
    service.start(0, 10.0, TIMES)
    service.advance(60.0)
    left = 128 - int(tokens)
    assert service.line.done_s[0] > 10.0 + 1.0 * (512 + tokens) / 512
    assert service.line.done_s[0] < 10.0 + 2.0 + left * 0.1


@given(st.integers(0, 1000), st.lists(st.floats(0.5, 60), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_every_request_is_done_once_whatever_is_taken_away(seed: int, moments: list[float]) -> None:
    arrivals = np.cumsum(np.random.default_rng(seed).exponential(2.0, 30))
    service = Service(arrivals, 3)
    for replica in range(3):
        service.start(replica, 0.0, TIMES)
    for number, moment in enumerate(sorted(moments)):
        service.advance(moment, 1.1)
        running, waiting = service.stop(number % 3)
        service.give_back(waiting)
        service.give_back(service.adopt((number + 1) % 3, running, moment + 0.5))
        service.start(number % 3, moment + 5.0, TIMES)
    service.advance(1000.0)
    assert service.all_done
    assert (service.line.tokens == 128).all()
    assert (service.line.done_s - arrivals > 128 * 0.1).all()
