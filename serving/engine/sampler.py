"""From logits to tokens: row by row, the same wherever and in whatever company a row is sampled."""

from __future__ import annotations

import math
import time

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from serving.engine.batch import SampledToken, SequenceStep, StepPlan
from serving.engine.exact import exp_nonpositive, softmax_terms
from serving.requests import Sampling, TopLogprob

_MASK64 = (1 << 64) - 1
_DEVICE_TIMEOUT_S = 20.0
_POLL_S = 50e-6  # each look takes the interpreter from others


@torch.inference_mode()
def sample(
    logits: Tensor, plan: StepPlan, *, exact: bool = True, timeout_s: float = _DEVICE_TIMEOUT_S
) -> list[SampledToken]:
    """One token for each sequence of the plan with `sampling` set; `logits` `[those, vocab]` in plan order.

    Greedy where the temperature is 0; equal logits go to the lowest id. Otherwise a draw that depends
    on the row, the request's seed and the output index alone. Log-probabilities are those of the
    untempered distribution. Without `exact` greedy choices and normalisers are the device's, in float32.
    Raises `TimeoutError` if the device does not get this far in `timeout_s`.
    """
    sequences = [sequence for sequence in plan.sequences if sequence.sampling is not None]
    scores = torch.nan_to_num(logits.double() if exact else logits, nan=-math.inf).clamp_(-1e30, 1e30)
    greedy = _fetch(_exact_choices(scores) if exact else _choices(scores), timeout_s).tolist()
    wishes = [row for row, one in enumerate(sequences) if one.sampling and _wishes(one.sampling)]
    rows = dict(zip(wishes, scores[wishes].double().cpu().numpy(), strict=True)) if wishes else {}
    return [
        _sampled(sequence, rows.get(row), normalizer, int(token), score)
        for row, (sequence, (token, score, normalizer)) in enumerate(zip(sequences, greedy, strict=True))
    ]


def uniform(seed: int, index: int) -> float:
    """A number in [0, 1) from the counter-based generator Philox under key `seed` and counter `index`."""
    generator = np.random.Philox(key=[seed & _MASK64, (seed >> 64) & _MASK64], counter=[0, index & _MASK64, 0, 0])
    return (int(generator.random_raw()) >> 11) * 2.0**-53


def _wishes(sampling: Sampling) -> bool:
    """Whether a row has to come to the host."""
    return sampling.temperature > 0 or sampling.logprobs > 0


def warm_up(device: torch.device, vocab: int) -> None:
    """Load the kernels that choices without `exact` take on a device."""
    _choices(torch.nan_to_num(torch.zeros((1, vocab), device=device), nan=-math.inf).clamp_(-1e30, 1e30))


def _exact_choices(scores: Tensor) -> Tensor:
    """float64 `[n, 3]`: greedy token, its score, logarithm of the exact sum of exponentials."""
    best = scores.amax(-1, keepdim=True)
    totals = softmax_terms(scores)[1]
    normalizers = [[math.log(total)] for total in totals[:, 0].tolist()]
    return torch.cat((_lowest(scores == best).double(), best, best + best.new_tensor(normalizers)), 1)


def _choices(scores: Tensor) -> Tensor:
    """The same in float32, but for the token: `argmax` returns the first of equals."""
    token = scores.argmax(-1, keepdim=True)
    return torch.cat((token.double(), scores.gather(1, token).double(), scores.logsumexp(-1, True).double()), 1)


def _fetch(choices: Tensor, timeout_s: float) -> Tensor:
    """To the host; a device that waits for a lost peer would keep a plain copy waiting for ever."""
    if choices.device.type != "cuda":
        return choices.cpu()
    copy = torch.empty(choices.shape, dtype=choices.dtype, pin_memory=True).copy_(choices, non_blocking=True)
    done = torch.cuda.Event()
    done.record()
    give_up_s = time.monotonic() + timeout_s
    while not done.query():
        if time.monotonic() > give_up_s:
            raise TimeoutError(f"the device did not finish a step within {timeout_s:g} s")
        time.sleep(_POLL_S)
    return copy


def _sampled(
    sequence: SequenceStep, row: NDArray[np.float64] | None, normalizer: float, token: int, score: float
) -> SampledToken:
    """`token` and its `score` are the greedy choice; `row` is there if more is wished for."""
    sampling = sequence.sampling or Sampling()
    top: list[TopLogprob] = []
    if row is not None:
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


def _lowest(chosen: Tensor) -> Tensor:
    """Lowest true index of each row `[n, 1]`, on whatever device and framework."""
    ids = torch.arange(chosen.shape[1], device=chosen.device)
    return torch.where(chosen, ids, chosen.shape[1]).amin(-1, keepdim=True)
