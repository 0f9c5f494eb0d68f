from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from data.layout import Device, ParallelConfig
from planning.load import IN_TOKENS, Pace
from serving.controller.dispatch import Dispatcher, Replica
from serving.controller.records import Record
from serving.requests import GenerationRequest, Limits


def request(key: int, model: str = "", tokens: int = 128) -> GenerationRequest:
    return GenerationRequest(request_id=str(key), prompt=(1,), model=model, limits=Limits(max_tokens=tokens))


def record(key: int, model: str = "", tokens: int = 128, deadline_at: float | None = None) -> Record:
    return Record(key, request(key, model, tokens), 0.0, deadline_at, None)


def replica(number: int, max_batch: int = 4, model: str = "", device: int | None = None) -> Replica:
    devices = (Device("i", number if device is None else device),)
    return Replica(number, 1, ParallelConfig(1, 1, 1, max_batch), devices, 10, model)


def dispatcher(*replicas: Replica, pace: Pace = IN_TOKENS) -> Dispatcher:
    result = Dispatcher(lambda one: pace)
    result.replicas = {one.number: one for one in replicas}
    return result


def test_requests_go_in_order_to_the_replica_with_most_room() -> None:
    one = dispatcher(replica(1), replica(2, max_batch=8))
    for key in range(20):
        one.enqueue(record(key))
    assigned = one.assign()
    assert [len(assigned[number]) for number in (1, 2)] == [5, 10]  # a batch and a quarter each
    assert sorted(r.key for records in assigned.values() for r in records) == list(range(15))
    assert all(keys == sorted(keys) for keys in ([r.key for r in records] for records in assigned.values()))
    assert one.waiting == 5


def test_what_lost_its_replica_comes_first_and_in_order_of_admission() -> None:
    one = dispatcher(replica(1), replica(2))
    for key in range(10):
        one.enqueue(record(key))
    one.assign()
    late = record(99)
    one.enqueue(late)
    left = one.drop([1, 2])
    assert one.assign() == {}
    one.requeue(left)
    one.replicas[3] = replica(3, max_batch=20)
    assert [r.key for r in one.assign()[3]] == [*range(10), 99]


def test_an_ended_request_leaves_the_queue_or_its_replica() -> None:
    one = dispatcher(replica(1, max_batch=1))
    records = [record(key) for key in range(4)]
    for each in records:
        one.enqueue(each)
    one.assign()
    assert one.release(records[3]) is None
    assert one.waiting == 1
    assert one.release(records[0]) is one.replicas[1]
    assert one.release(records[0]) is one.replicas[1]  # no harm in saying it twice
    assert [r.key for r in one.assign()[1]] == [2]


def test_a_replica_on_hold_gets_nothing() -> None:
    one = dispatcher(replica(1))
    one.replicas[1].serving = False
    one.enqueue(record(1))
    assert one.assign() == {}


def test_requests_go_to_replicas_of_their_own_model() -> None:
    one = dispatcher(replica(1, model="a"), replica(2, model="b"), replica(3, model="b"))
    for key in range(12):
        one.enqueue(record(key, "ab"[key % 2]))
    assigned = one.assign()
    assert sorted(each.key for each in assigned[1]) == [0, 2, 4, 6, 8]
    assert sorted(each.key for number in (2, 3) for each in assigned[number]) == [1, 3, 5, 7, 9, 11]
    one.requeue(one.drop([2, 3]))
    one.enqueue(record(99, "c"))
    assert one.assign() == {}, "a queue that moves not holds up no other, and nobody takes what is not his"
    assert one.waiting == 1 + 6 + 1


def test_a_request_goes_where_the_least_work_is_left() -> None:
    one = dispatcher(replica(1), replica(2))
    for key, tokens in enumerate((400, 10, 10, 10)):
        one.enqueue(record(key, tokens=tokens))
    assigned = one.assign()
    assert [[each.key for each in assigned[number]] for number in (1, 2)] == [[0], [1, 2, 3]]


def test_work_of_models_that_share_the_devices_counts_too() -> None:
    one = dispatcher(replica(1, model="a", device=1), replica(2, model="b", device=1), replica(3, model="b", device=3))
    one.enqueue(record(0, "a", tokens=300))
    one.assign()
    for key in (1, 2):
        one.enqueue(record(key, "b", tokens=100))
    assert [each.key for each in one.assign()[3]] == [1, 2]
    assert [each.number for each in one.group(one.replicas[1])] == [1, 2]


def test_the_end_of_a_request_is_predicted_from_what_is_ahead_of_it() -> None:
    pace = Pace(prefill_token_s=0.0, step_s=0.1, max_batch=1)
    shared = [replica(1, 1, "a", device=1), replica(2, 1, "b", device=1)]
    one = dispatcher(*shared, pace=pace)
    asked = request(9, "a", tokens=10)
    assert one.done_in_s(asked, due_at=5.0) == pytest.approx(1.0)
    one.enqueue(record(1, "b", tokens=10, deadline_at=9.0))
    one.assign()
    assert one.done_in_s(asked, due_at=5.0) == pytest.approx(1.0), "the other model's request is not urgent"
    assert one.done_in_s(asked, due_at=10.0) == pytest.approx(2.0), "it is due before, and takes every other step"
    for key in (2, 3):
        one.enqueue(record(key, "a", tokens=10))
    one.assign()
    assert one.done_in_s(asked, due_at=5.0) == pytest.approx(3.0)
    assert one.done_in_s(request(9, "c"), due_at=5.0) == 0.0, "nothing is known of a model without a replica"
    assert dispatcher(replica(1)).done_in_s(request(9), due_at=5.0) == 0.0


class Dispatching(RuleBasedStateMachine):
    """Whatever happens, every unfinished request is in the queue or on one live replica, exactly once."""

    waiting = Bundle("waiting")

    def __init__(self) -> None:
        super().__init__()
        self.dispatcher = Dispatcher()
        self.alive: dict[int, Record] = {}
        self.keys = self.numbers = 0

    @rule(target=waiting)
    def admit(self) -> Record:
        self.keys += 1
        self.alive[self.keys] = one = record(self.keys)
        self.dispatcher.enqueue(one)
        return one

    @rule(max_batch=st.integers(1, 5))
    def add_replica(self, max_batch: int) -> None:
        self.numbers += 1
        self.dispatcher.replicas[self.numbers] = replica(self.numbers, max_batch)

    @rule(data=st.data())
    def hold(self, data: st.DataObject) -> None:
        if self.dispatcher.replicas:
            data.draw(st.sampled_from(list(self.dispatcher.replicas.values()))).serving = data.draw(st.booleans())

    @rule(data=st.data())
    def lose_replica(self, data: st.DataObject) -> None:
        if self.dispatcher.replicas:
            self.dispatcher.requeue(self.dispatcher.drop([data.draw(st.sampled_from(list(self.dispatcher.replicas)))]))

    @rule(one=consumes(waiting))
    def end(self, one: Record) -> None:
        one.finish = "stop"
        self.dispatcher.release(one)
        del self.alive[one.key]

    @rule()
    def assign(self) -> None:
        rooms = {number: max(one.room, 0) for number, one in self.dispatcher.replicas.items()}
        waiting = self.dispatcher.waiting
        assigned = self.dispatcher.assign()
        assert sum(map(len, assigned.values())) == min(waiting, sum(rooms.values()))
        assert all(len(records) <= rooms[number] for number, records in assigned.items())

    @invariant()
    def nobody_is_lost_or_doubled(self) -> None:
        on_replicas = [key for one in self.dispatcher.replicas.values() for key in one.records]
        queued = [one.key for queue in self.dispatcher._queues.values() for one in queue]
        assert sorted(on_replicas + queued) == sorted(self.alive)
        for number, one in self.dispatcher.replicas.items():
            assert all(each.replica == number for each in one.records.values())


TestDispatching = Dispatching.TestCase
TestDispatching.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
