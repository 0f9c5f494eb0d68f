"""How many decode steps still fit before a batch has to stop."""

from __future__ import annotations

from planning.static_batch import OUTPUT_TOKENS, StaticBatchProfile, StaticConfig

# The artifact's safety factor: slower than profiled before a preemption, faster before an acquisition.
_MARGIN = 1.1


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
