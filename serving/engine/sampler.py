"""From logits to tokens: row by row, the same wherever and in whatever company a row is sampled."""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.batch import SampledToken, SequenceStep, StepPlan
from serving.engine.exact import exp_nonpositive, softmax_terms
from serving.requests import Sampling, TopLogprob

_MASK64 = (1 << 64) - 1


@torch.inference_mode()
def sample(logits: Tensor, plan: StepPlan) -> list[SampledToken]:
    """One token for each sequence of the plan with `sampling` set; `logits` `[those, vocab]` in plan order.

    Greedy where the temperature is 0; equal logits go to the lowest id. Otherwise a draw that depends
    on the row, the request's seed and the output index alone. Log-probabilities are those of the
    untempered distribution.
    """
    sequences = [sequence for sequence in plan.sequences if sequence.sampling is not None]
    scores = torch.nan_to_num(logits.double(), nan=-math.inf).clamp_(-1e30, 1e30)
    best = scores.amax(-1, keepdim=True)
    totals = softmax_terms(scores)[1]
    greedy = zip(_lowest(scores == best), best[:, 0].tolist(), totals[:, 0].tolist(), strict=True)
    return [
        _sampled(sequence, scores[row], high + math.log(total), token, high)
        for row, (sequence, (token, high, total)) in enumerate(zip(sequences, greedy, strict=True))
    ]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from the counter-based generator Philox under key `seed` and counter `index`."""
    generator = np.random.Philox(key=[seed & _MASK64, (seed >> 64) & _MASK64], counter=[0, index & _MASK64, 0, 0])
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _sampled(sequence: SequenceStep, scores: Tensor, normalizer: float, token: int, score: float) -> SampledToken:
    """`token` and its `score` are the greedy choice; only other wishes bring the row to the host."""
    sampling = sequence.sampling or Sampling()
    top: list[TopLogprob] = []
    if sampling.temperature > 0 or sampling.logprobs > 0:
        row = scores.cpu().numpy()
        if sampling.temperature > 0:
            token = draw(row, sampling, uniform(sampling.seed, sequence.output_index))
            score = float(row[token])
        order = np.argsort(-row, kind="stable")[: sampling.logprobs] if sampling.logprobs else np.empty(0, np.intp)
        top = [TopLogprob(int(other), float(row[other]) - normalizer) for other in order]
    return SampledToken(sequence.key, token, score - normalizer, top)


def draw(scores: NDArray[np.float64], sampling: Sampling, point: float) -> int:
    """The token at `point` in [0, 1) of the distribution: temperature first, then top-k, then top-p.

    Where something is cut off, candidates are in order of decreasing probability, equals in order of id;
    otherwise in order of id, which spares sorting the vocabulary. Top-p keeps the fewest that reach
    that probability.
    """
    scaled = (scores - scores.max()) / sampling.temperature
    cut = sampling.top_k > 0 or sampling.top_p < 1.0
    order = np.argsort(-scaled, kind="stable") if cut else np.arange(len(scaled))
    if sampling.top_k > 0:
        order = order[: sampling.top_k]
    cumulative = np.cumsum(exp_nonpositive(torch.from_numpy(scaled[order])).numpy())
    kept = len(order)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(cumulative, sampling.top_p * cumulative[-1])) + 1
    index = int(np.searchsorted(cumulative[:kept], point * cumulative[kept - 1], side="right"))
    return int(order[min(index, kept - 1)])


def _lowest(chosen: Tensor) -> list[int]:
    """Lowest true index of each row; `argmax` would leave open which of several it returns."""
    ids = torch.arange(chosen.shape[1], device=chosen.device)
    result: list[int] = torch.where(chosen, ids, chosen.shape[1]).amin(-1).tolist()
    return result
