from __future__ import annotations

from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from planning.load import IN_TOKENS, Pace, Server, Work, done_in_s

PACE = Pace(prefill_token_s=0.01, step_s=0.1, max_batch=2)
WORK = Work(prefill_tokens=10, decode_tokens=9)  # a second in its slot

works = st.builds(Work, st.integers(0, 50), st.integers(1, 50))
paces = st.builds(Pace, st.floats(0, 0.1), st.floats(0.01, 1), st.integers(1, 4))
servers = st.lists(st.builds(Server, paces, st.lists(works, max_size=6).map(tuple)), min_size=1, max_size=3)


def test_a_request_has_a_slot_for_its_time_and_the_devices_for_its_share() -> None:
    assert PACE.alone_s(WORK) == pytest.approx(1.0)
    assert PACE.device_s(WORK) == pytest.approx(0.55)
    assert PACE.beside([PACE]).alone_s(WORK) == pytest.approx(1.9)
    assert IN_TOKENS.device_s(WORK) == 19


@pytest.mark.parametrize(
    ("running", "queued", "done_s"), [(0, 0, 1.0), (1, 0, 1.0), (2, 0, 2.0), (2, 1, 2.0), (2, 2, 3.0), (3, 0, 2.0)]
)
def test_who_finds_no_free_slot_waits_for_one(running: int, queued: int, done_s: float) -> None:
    server = Server(PACE, (WORK,) * running)
    assert done_in_s([server], [WORK] * queued, WORK) == pytest.approx(done_s)
    assert done_in_s([server, Server(PACE, ())], [], WORK) == pytest.approx(1.0)
    assert done_in_s([], [], WORK) == inf


@given(servers=servers, queued=st.lists(works, max_size=5), own=works, more=works)
def test_more_ahead_is_never_sooner_and_another_replica_never_later(
    servers: list[Server], queued: list[Work], own: Work, more: Work
) -> None:
    done_s = done_in_s(servers, queued, own)
    assert done_s >= min(server.pace.alone_s(own) for server in servers) - 1e-9
    same = Server(servers[0].pace, ())
    alike = [Server(servers[0].pace, server.works) for server in servers]
    assert done_in_s(alike, [*queued, more], own) >= done_in_s(alike, queued, own) - 1e-9
    assert done_in_s([*alike, same], queued, own) <= done_in_s(alike, queued, own) + 1e-9
