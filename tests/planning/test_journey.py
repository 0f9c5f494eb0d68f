"""Books for the journey: what is chosen with one layout or another in force, and that it is chosen once."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data.cluster import ClusterSpec, ClusterState, InstanceType
from data.errors import InvalidInput
from data.layout import ParallelConfig
from data.plan import Objective, PlanBook
from planning.availability import steady
from planning.book import Policy, build_book
from planning.changes import Changes
from planning.charges import Traffic
from planning.journey import Outlook
from planning.simulation.serving_perennial import Charges
from tests.planning.test_book import REFERENCE, SPEC, costs

WHOLE = costs().memory_bytes(ParallelConfig(1, 1, 1, 8), 128)


def kind(memory: float = 0.6, price: float = 0.0, devices: int = 1) -> InstanceType:
    """Devices on which `memory` of what one needs alone fits."""
    return InstanceType("spot", devices, "CPU", int(WHOLE * memory), 1e6, 1e6, 3 * price, price, grace_s=2.0)


def book(
    policy: Policy = "journey",
    most: int = 6,
    objective: Objective = REFERENCE,
    machine: InstanceType | None = None,
    **outlook: object,
) -> PlanBook:
    fleet = ClusterSpec("spot", (machine or kind(),), (most,))
    return build_book(SPEC, fleet, costs(), objective, policy, outlook=Outlook(**outlook))  # type: ignore[arg-type]


def state(count: int) -> ClusterState:
    return ClusterState.of({"spot": count})


@settings(max_examples=25, deadline=None)
@given(
    st.sampled_from(["journey", "hysteresis"]),
    st.floats(0.0, 60.0),
    st.floats(0.3, 1.2),
    st.floats(1e-5, 1.0),
    st.floats(1e-5, 1.0),
    st.floats(0.0, 30.0),
    st.integers(1, 2),
)
@example("journey", 1.0, 0.3046875, 1e-5, 1e-5, 1.0, 1)  # a fleet that hardly ever changes
def test_choosing_twice_is_choosing_once(
    policy: Policy, rate: float, memory: float, lost: float, come: float, cut_s: float, devices: int
) -> None:
    process = steady(5, lost, come, along=0.3)
    made = book(
        policy,
        5,
        replace(REFERENCE, required_rps=rate),
        kind(memory, devices=devices),
        process=process,
        charges=Charges(cut_s=cut_s),
    )
    assert PlanBook.from_bytes(made.to_bytes()) == made
    assert [plan.state.instances for plan in made.plans] == [1, 2, 3, 4, 5]
    layouts = {move.now for move in made.moves} | {plan.config for plan in made.plans} | {ParallelConfig(9, 9, 9, 9)}
    for plan in made.plans:
        for now in layouts | {None}:
            then = made.plan_for(plan.state, now)
            assert then.config is None or then.config.devices <= made.cluster.devices(plan.state)
            assert (then.config is None) == (plan.config is None)
            assert made.plan_for(plan.state, then.config).config == then.config


def test_a_layout_stays_where_changing_costs_more_than_it_brings() -> None:
    """With instances that flicker and changes that hurt, nobody goes back and forth."""
    flicker = steady(6, 0.02, 0.05)
    dear, cheap = (
        book(process=flicker, charges=Charges(cut_s=cut_s, prepare_s=prepare_s, background=1.0))
        for cut_s, prepare_s in ((60.0, 10.0), (0.0, 0.0))
    )

    def changes(made: PlanBook) -> int:
        """Of a fleet that goes down to 3 and up again, once it is in its stride."""
        now, seen = None, []
        for count in (6, 5, 4, 3, 4, 5, 6) * 3:
            now = made.plan_for(state(count), now).config
            seen.append(now)
        return sum(before != after for before, after in pairwise(seen[7:]))

    assert changes(dear) < changes(cheap)
    assert any(now == then != plan.config for plan in dear.plans for now, then in plan.transitions)


def test_what_a_plan_explains_itself_with() -> None:
    made = book(machine=kind(price=2.0))
    for plan in made.plans[1:]:
        assert plan.config is not None
        assert plan.estimate is not None
        used = plan.config.devices
        assert plan.estimate.price_usd_h == 2.0 * used
        assert f"on {used} of {plan.state.instances} instances" in plan.reason
        assert plan.config in [one.config for one in plan.frontier]
        for other in plan.frontier:
            if other.config != plan.config:
                move = made.move(plan.config, other.config)
                assert move is not None
                assert move.pause_s + move.prepare_s > 0
        (loss,) = made.losses(plan)
        assert loss.config == made.plan_for(loss.state, plan.config).config
        assert (loss.move is None) == (loss.config in (None, plan.config))
    assert "an assumption" in made.assumptions
    assert made.plans[0].config is None
    assert "does not fit on 1 devices" in made.plans[0].reason


def test_rent_weighs_against_waiting() -> None:
    rich, poor = (book(machine=kind(1.2, price=5.0), waiting_usd_h=worth) for worth in (1e6, 0.1))
    assert rich.plans[-1].config is not None
    assert poor.plans[-1].config is not None
    assert poor.plans[-1].config.devices < rich.plans[-1].config.devices
    assert "5 spares" in poor.plans[-1].reason


def test_deadline_misses_weigh() -> None:
    objective = replace(REFERENCE, required_rps=12.0)
    free = book(objective=objective, machine=kind(1.2, price=40.0)).plans[-1].estimate
    assert free is not None
    limited = book(objective=replace(objective, slo_s=0.7 * free.latency_s), machine=kind(1.2, price=40.0))
    kept = limited.plans[-1].estimate
    assert kept is not None
    assert kept.latency_s < free.latency_s


def test_several_types_are_refused_with_a_way_out() -> None:
    fleet = ClusterSpec("two", (kind(), replace(kind(), name="other")), (2, 2))
    for policy in ("journey", "hysteresis"):
        with pytest.raises(InvalidInput, match="choose the policy perennial"):
            build_book(SPEC, fleet, costs(), REFERENCE, policy)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="worth more than nothing"):
        Outlook(waiting_usd_h=0.0)


def test_changes_move_what_is_missing_once_for_an_instance() -> None:
    machine = kind(devices=2)
    changes = Changes(costs(), machine, REFERENCE, Charges())
    one = ParallelConfig(1, 1, 2, 8)
    two = replace(one, replicas=2)
    grown, shrunk = changes.between(one, two, 4.0), changes.between(two, one, 4.0)
    assert grown.moved_bytes == SPEC.weight_bytes
    assert (grown.pause_s, shrunk.moved_bytes, shrunk.prepare_s) == (0.0, 0, 0.0)
    assert shrunk.pause_s > Charges().cut_s
    inside = changes.between(one, ParallelConfig(1, 2, 1, 8), 4.0)
    assert inside.moved_bytes == 0
    assert inside.prepare_s > 0
    spread = changes.between(ParallelConfig(1, 2, 2, 8), one, 4.0)
    assert 0.4 < spread.moved_bytes / SPEC.weight_bytes < 0.6
    assert changes.between(one, one, 4.0).prepare_s == 0.0
    for move in (grown, shrunk, inside, spread):
        assert changes.cost_s(move, 4.0) > changes.cost_s(move, 0.0) == 0.0


def test_bytes_with_a_price_and_another_link() -> None:
    machine = kind()
    here, there = ParallelConfig(1, 1, 1, 8), ParallelConfig(1, 2, 1, 8)
    plain, priced = (
        Changes(costs(), machine, REFERENCE, Charges(), traffic)
        for traffic in (None, Traffic(link_bytes_per_s=1e3, usd_per_gb=2.0))
    )
    move = priced.between(here, there, 4.0)
    assert move.moved_bytes == plain.between(here, there, 4.0).moved_bytes
    assert move.prepare_s > plain.between(here, there, 4.0).prepare_s
    assert plain.price_usd(move, 4.0) == 0
    assert priced.price_usd(move, 4.0) > priced.price_usd(move, 0.0) == move.moved_bytes / 1e9 * 2.0


def test_dear_bytes_keep_a_layout() -> None:
    flicker = steady(6, 0.02, 0.05)
    cheap, dear = (book(process=flicker, traffic=Traffic(usd_per_gb=usd)) for usd in (0.0, 1e6))
    stays = [sum(now == then for plan in made.plans for now, then in plan.transitions) for made in (cheap, dear)]
    assert stays[0] < stays[1]
