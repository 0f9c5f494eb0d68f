import math

import numpy as np
import pytest
import torch
from torch import Tensor

from serving.engine.batch import SampledToken, SequenceStep, StepPlan
from serving.engine.sampler import draw, sample, uniform
from serving.requests import Sampling


def plan_of(*samplings: Sampling | None, output_index: int = 0) -> StepPlan:
    return StepPlan(
        1, [SequenceStep(key, 0, [1], [0], sampling, output_index) for key, sampling in enumerate(samplings)]
    )


def one(logits: Tensor, sampling: Sampling, output_index: int = 0) -> SampledToken:
    return sample(logits[None], plan_of(sampling, output_index=output_index))[0]


def test_greedy_takes_the_lowest_of_equals_and_skips_unsampled_sequences() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    tokens = sample(logits, plan_of(Sampling(), None, Sampling()))
    assert [(token.key, token.token) for token in tokens] == [(0, 1), (2, 0)]
    assert tokens[1].logprob == pytest.approx(math.log(0.25))


def test_logprobs_are_those_of_the_softmax() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(1)) * 3
    expected = logits.double().log_softmax(-1)
    token = one(logits, Sampling(logprobs=5, temperature=0.7, seed=4))
    assert token.logprob == pytest.approx(expected[token.token].item(), abs=1e-7)
    assert [other.token_id for other in token.top] == expected.topk(5).indices.tolist()
    assert [other.logprob for other in token.top] == pytest.approx(expected.topk(5).values.tolist(), abs=1e-7)


def test_draws_follow_the_distribution() -> None:
    """Chi-square over 4000 output positions of one seed; 31.3 is exceeded once in 2000 for 10 degrees of freedom."""
    logits = torch.randn(11, generator=torch.Generator().manual_seed(2))
    expected = (logits.double() / 0.8).softmax(-1) * 4000
    plan = StepPlan(1, [SequenceStep(i, 0, [1], [0], Sampling(temperature=0.8, seed=11), i) for i in range(4000)])
    counts = np.bincount([token.token for token in sample(logits.expand(4000, -1), plan)], minlength=11)
    assert ((torch.from_numpy(counts) - expected) ** 2 / expected).sum() < 31.3


def test_a_draw_depends_on_seed_and_index_but_not_on_company() -> None:
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(5, 101, generator=generator)
    samplings = [Sampling(temperature=1.3, seed=seed, top_k=40, top_p=0.95, logprobs=2) for seed in range(5)]
    together = sample(logits, plan_of(*samplings, output_index=9))
    for key, (row, sampling) in enumerate(zip(logits, samplings, strict=True)):
        alone = one(row, sampling, output_index=9)
        assert (alone.token, alone.logprob, alone.top) == (
            together[key].token,
            together[key].logprob,
            together[key].top,
        )
    draws = {one(logits[0], Sampling(temperature=3.0, seed=1), index).token for index in range(20)}
    assert len(draws) > 10
    seeds = {one(logits[0], Sampling(temperature=3.0, seed=seed)).token for seed in range(-10, 10)}
    assert len(seeds) > 10


def test_uniform_is_pinned() -> None:
    """A resumed stream must continue after an upgrade: these numbers may never change."""
    assert [uniform(7, 0), uniform(7, 1), uniform(-1, 2)] == [
        0.8720734548204873,
        0.8734503010139788,
        0.007971486500901959,
    ]
    assert all(0 <= uniform(seed, 5) < 1 for seed in (0, -1, 2**63, 2**70))


@pytest.mark.parametrize(
    ("top_k", "top_p", "allowed"), [(2, 1.0, {0, 1}), (0, 0.6, {0, 1}), (0, 0.4, {0}), (1, 1.0, {0})]
)
def test_top_k_and_top_p_cut(top_k: int, top_p: float, allowed: set[int]) -> None:
    scores = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    sampling = Sampling(temperature=1.0, top_k=top_k, top_p=top_p)
    assert {draw(scores, sampling, point) for point in np.linspace(0, 0.9999, 200)} == allowed


def test_not_a_number_does_not_crash() -> None:
    assert one(torch.full((4,), math.nan), Sampling()).token == 0
    assert one(torch.tensor([math.nan, 1.0, math.inf]), Sampling(temperature=1.0)).token == 2
