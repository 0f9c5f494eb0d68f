"""What to do with the time before devices go: until when to decode, and what becomes of every request.

SpotServe's arranger counts the steps of a whole batch (`steps_that_fit`); ours decides for each request (`arrange`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data.errors import InvalidInput
from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile, StaticConfig

# The artifact's safety factor: slower than profiled before a preemption, faster before an acquisition.
_MARGIN = 1.1
_ROUNDING_S = 1e-9


def slot_times_s(profile: StaticBatchProfile, config: StaticConfig, *, acquisition: bool) -> tuple[float, float]:
    """Seconds of a prefill and of a decode step as SpotServe's arranger counts them (ASPLOS'24, §4.1).

    Without the factor of the cost model and without embeddings, times the safety margin. Micro-batch
    counts that do not divide the batch are replaced by 1.
    """
    margin = 1 / _MARGIN if acquisition else _MARGIN
    used = StaticConfig(
        config.replicas,
        config.stages,
        config.shards,
        config.batch,
        config.prefill_micro if config.batch % config.prefill_micro == 0 else 1,
        config.decode_micro if config.batch % config.decode_micro == 0 else 1,
    )
    prefill, decode = profile.prefill_ms(used, factor=1.0), profile.decode_ms(used, factor=1.0)
    return margin * prefill / 1e3, margin * decode / 1e3


def stop_threshold_s(profile: StaticBatchProfile, config: StaticConfig) -> float:
    """Slots up to this long are not worth starting: a single request's prefill with the margin."""
    single = StaticConfig(config.replicas, config.stages, config.shards, 1, config.prefill_micro, config.decode_micro)
    return slot_times_s(profile, single, acquisition=False)[0]


def steps_that_fit(
    profile: StaticBatchProfile, config: StaticConfig, slot_s: float, *, acquisition: bool, stop_rule: bool = True
) -> int | None:
    """Decode steps of a batch to run in `slot_s` seconds; None: all of them fit, 0: do not start.

    Before a preemption one step less than fits, before an acquisition one more (SpotServe, ASPLOS'24,
    §4.1, in the form of its artifact). With `stop_rule`, slots up to `stop_threshold_s` give 0.
    """
    if stop_rule and slot_s <= stop_threshold_s(profile, config):
        return 0
    prefill, decode = slot_times_s(profile, config, acquisition=acquisition)
    steps = int((slot_s - prefill) / decode) + (1 if acquisition else -1)
    if steps <= 0:
        return 0
    return None if steps >= OUTPUT_TOKENS else steps


@dataclass(frozen=True, slots=True)
class Carried:
    """A request on devices that go: tokens whose KV is there, and how many more it decodes at most."""

    key: int
    cached_tokens: int
    left_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of a decode step and of a change by itself; to move one token's KV, and to compute it again."""

    step_s: float
    change_s: float
    move_s: float
    replay_s: float

    def __post_init__(self) -> None:
        if not self.step_s > 0 or min(self.change_s, self.move_s, self.replay_s) < 0:
            raise InvalidInput(f"a step takes longer than no time, and nothing takes less: {self}")


@dataclass(frozen=True, slots=True)
class Arrangement:
    """Decode for `decode_s` more seconds; by then requests `finish`, `move` with their KV, or are to `replay`."""

    decode_s: float
    finish: frozenset[int]
    move: frozenset[int]
    replay: frozenset[int]


def arrange(requests: Sequence[Carried], timing: Timing, left_s: float, most_s: float = float("inf")) -> Arrangement:
    """Decode as long as everybody who has not finished by then can still be moved within `left_s`, at most `most_s`.

    If not even now all can be moved, the longest go first as far as the time allows, and the others are
    replayed; so are all if computing KV is quicker than moving it. Nothing is planned past `left_s` seconds.
    """
    moving = timing.move_s < timing.replay_s
    decode_s = min(most_s, max(_latest(requests, timing, left_s, timing.move_s if moving else 0.0), default=0.0))
    finish = frozenset(one.key for one in requests if one.left_tokens * timing.step_s <= decode_s)
    staying = sorted((one for one in requests if one.key not in finish), key=lambda one: (-one.cached_tokens, one.key))
    budget_s, move = left_s - timing.change_s - decode_s, set()
    for one in staying if moving else ():
        cost_s = timing.move_s * (one.cached_tokens + decode_s / timing.step_s)
        if cost_s <= budget_s + _ROUNDING_S:
            budget_s -= cost_s
            move.add(one.key)
    return Arrangement(decode_s, finish, frozenset(move), frozenset(one.key for one in staying if one.key not in move))


def _latest(requests: Sequence[Carried], timing: Timing, left_s: float, move_s: float) -> Iterator[float]:
    """For every number of requests that finish, the last moment at which the others can still be moved, if any.

    Between two ends, what has to be moved grows by a token a step and request; at an end it shrinks.
    """
    order = sorted(requests, key=lambda one: one.left_tokens)
    ends_s = [0.0, *(one.left_tokens * timing.step_s for one in order), float("inf")]
    tokens = sum(one.cached_tokens for one in order)
    for done in range(len(order) + 1):
        running = len(order) - done
        moment = (left_s - timing.change_s - move_s * tokens) / (1 + running * move_s / timing.step_s)
        moment = min(moment, ends_s[done + 1])
        if moment >= ends_s[done]:
            yield moment
        tokens -= order[done].cached_tokens if running else 0
