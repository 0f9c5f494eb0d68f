"""Recorded decode steps: on CUDA the real recordings; on a CPU static buffers and padding, computed anew each time."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from data.models import ModelSpec
from serving.engine.batch import SequenceStep, StepPlan
from serving.engine.graphs import DecodeGraphs, graph_sizes
from serving.engine.kv_cache import KvCache
from serving.engine.layers import Parts
from serving.engine.model import ShardModel, make_numerics, sampled_rows
from serving.engine.models import make_decoder
from serving.engine.place import Place, Rehearsed, SoloCommunicator
from serving.engine.step import SHORT_TOKENS, StepTensors
from serving.requests import Sampling
from tests.serving.engine.cells import extract, insert

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")  # Triton's interpreter

BLOCKS, BLOCK_TOKENS = 12, 4
SPEC = ModelSpec.from_hf_config(
    {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 48,
        "vocab_size": 50,
        "max_position_embeddings": 32,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
    },
    name="small",
)


def random_weights(place: Place, device: torch.device) -> dict[str, Tensor]:
    torch.manual_seed(7)
    return {
        tensor.name: torch.randn([high - low for low, high in zip(start, stop, strict=True)]).mul(0.2).to(device)
        for tensor, start, stop in place.boxes(SPEC)
    }


def decode(*starts: int, blocks: Sequence[Sequence[int]], token: int = 3) -> StepPlan:
    return StepPlan(
        1,
        [
            SequenceStep(key, start, [token + key], list(table), Sampling(), 0)
            for key, (start, table) in enumerate(zip(starts, blocks, strict=True))
        ],
    )


def step(key: int, start: int, count: int, blocks: list[int]) -> SequenceStep:
    """`count` tokens of a sequence, the last of which is sampled."""
    return SequenceStep(key, start, list(range(start, start + count)), blocks, Sampling(), 0)


@dataclass
class Rerun:
    """In place of a recording where there is no device: compute again into the same output."""

    compute: Callable[[], Tensor | None]
    output: Tensor | None

    def replay(self) -> None:
        again = self.compute()
        if self.output is not None and again is not None:
            self.output.copy_(again)

    def reset(self) -> None:
        pass


def rerun(compute: Callable[[], Tensor | None]) -> tuple[Rerun, Tensor | None]:
    output = compute()
    return Rerun(compute, output), output


@dataclass
class Part:
    """A place with its cache, run eagerly or from recordings."""

    place: Place
    device: torch.device

    def __post_init__(self) -> None:
        heads = self.place.kv_heads(SPEC)
        self.cache = KvCache(self.place.layers, heads, SPEC.head_dim, BLOCKS, BLOCK_TOKENS, torch.float32, self.device)
        numerics = make_numerics("native", SPEC, torch.float32, self.device)
        parts = Parts(
            SPEC, self.place, random_weights(self.place, self.device), numerics, Rehearsed(SoloCommunicator())
        )
        self.decoder = make_decoder(parts, self.cache)
        width = None if self.place.first else SPEC.hidden
        record = None if self.device.type == "cuda" else rerun
        self.graphs = DecodeGraphs(self.compute, self.cache, width=width, most_blocks=8, record=record)

    def compute(self, step: StepTensors, hidden: Tensor | None) -> Tensor | None:
        if self.place.first:
            hidden = self.decoder.embed(step)
        assert hidden is not None
        hidden = self.decoder.run_layers(hidden, step)
        return self.decoder.logits(hidden) if self.place.last else hidden

    @torch.inference_mode()
    def eager(self, plan: StepPlan, hidden: Tensor | None = None) -> Tensor:
        step = StepTensors.of(plan, block_tokens=BLOCK_TOKENS, window=None, device=self.device, paged=True)
        output = self.compute(step, hidden)
        assert output is not None
        return output

    @torch.inference_mode()
    def replayed(self, plan: StepPlan, hidden: Tensor | None = None) -> Tensor:
        recorded = self.graphs.step_for(plan)
        assert recorded is not None
        output = recorded.run(plan, hidden)
        assert output is not None
        return output.clone()

    @torch.inference_mode()
    def capture(self, *sizes: int) -> dict[int, float]:
        return self.graphs.capture(sizes)


@pytest.fixture
def whole(kernel_device: torch.device) -> Part:
    return Part(Place((0, 2), 0, 1, first=True, last=True), kernel_device)


def test_replayed_steps_are_the_eager_ones_and_leave_the_rest_of_the_cache_alone(
    whole: Part, kernel_device: torch.device
) -> None:
    other = Part(whole.place, kernel_device)
    for pages in (*whole.cache.pages(0), *whole.cache.pages(1)):
        pages[:BLOCKS].normal_()
    before = extract(whole.cache, range(BLOCKS), BLOCKS * BLOCK_TOKENS, (0, 2), (0, 1))
    insert(other.cache, range(BLOCKS), BLOCKS * BLOCK_TOKENS, (0, 2), (0, 1), before)
    whole.capture(4, 2)
    assert torch.equal(extract(whole.cache, range(BLOCKS), BLOCKS * BLOCK_TOKENS, (0, 2), (0, 1)), before)
    plans = [
        decode(3, 6, 0, blocks=[[5], [2, 9], [0]]),
        decode(4, 7, 1, blocks=[[5, 11], [2, 9], [0]]),
        decode(8, blocks=[[2, 9, 1]]),
        decode(2, 3, blocks=[[0], [7]]),
        StepPlan(5, [step(1, 3, 3, [0, 4]), step(2, 8, 1, [2, 9, 1])], []),  # one of them catches up
    ]
    for plan in plans:
        expected = other.eager(plan)
        torch.testing.assert_close(whole.replayed(plan), expected)
        cached = (extract(part.cache, range(BLOCKS), BLOCKS * BLOCK_TOKENS, (0, 2), (0, 1)) for part in (whole, other))
        torch.testing.assert_close(*cached)


def test_stages_hand_activations_through_static_buffers(whole: Part, kernel_device: torch.device) -> None:
    first = Part(Place((0, 1), 0, 1, first=True, last=False), kernel_device)
    last = Part(Place((1, 2), 0, 1, first=False, last=True), kernel_device)
    weights = random_weights(whole.place, kernel_device)
    for part in (first, last):  # the parts draw other numbers; give them the whole model's
        own = {name: weights[name] for name in random_weights(part.place, kernel_device)}
        parts = Parts(
            SPEC,
            part.place,
            own,
            make_numerics("native", SPEC, torch.float32, kernel_device),
            Rehearsed(SoloCommunicator()),
        )
        part.decoder = make_decoder(parts, part.cache)
        part.capture(2)
    for start in range(3):
        plan = decode(start, start + 4, blocks=[[3], [1, 8]], token=start)
        hidden = first.replayed(plan)
        assert hidden.shape == (2, SPEC.hidden)
        torch.testing.assert_close(last.replayed(plan, hidden), whole.eager(plan))


def test_few_rows_of_each_sequence_fit(whole: Part) -> None:
    whole.capture(2, SHORT_TOKENS + 1)
    fits = decode(3, 6, blocks=[[5], [2, 9]])
    assert whole.graphs.step_for(fits) is whole.graphs.step_for(StepPlan(1, [step(1, 3, 2, [5, 6])]))
    assert whole.graphs.step_for(StepPlan(1, [step(1, 3, SHORT_TOKENS, [5, 6])])) is not None
    assert whole.graphs.step_for(StepPlan(1, [step(1, 3, SHORT_TOKENS + 1, [5, 6])])) is None
    assert whole.graphs.step_for(StepPlan(1, [step(key, 3, 3, [key]) for key in range(2)])) is None


def test_only_logits_that_are_wanted_are_returned() -> None:
    logits = torch.arange(6.0)[:, None]
    silent = SequenceStep(9, 0, [1], [7], None, 0)
    plan = StepPlan(1, [step(1, 3, 2, [5]), silent, step(2, 8, 3, [6])])
    assert sampled_rows(logits, plan).flatten().tolist() == [1.0, 5.0]  # type: ignore[union-attr]
    assert sampled_rows(logits[:1], StepPlan(1, [silent])) is None
    assert sampled_rows(logits[:2], StepPlan(1, [step(1, 3, 1, [5]), step(2, 8, 1, [6])])) is not None


def test_sizes_are_captured_once(whole: Part) -> None:
    assert list(whole.capture(1, 2)) == [2, 1]
    assert list(whole.capture(1, 2, 4)) == [4]


def test_a_cpu_records_nothing() -> None:
    device, place = torch.device("cpu"), Place((0, 2), 0, 1, first=True, last=True)
    cache = KvCache(place.layers, (0, 1), SPEC.head_dim, BLOCKS, BLOCK_TOKENS, torch.float32, device)
    model = ShardModel(
        SPEC, place, random_weights(place, device), numerics="native", comm=SoloCommunicator(), cache=cache
    )
    assert model.warm([1, 2]) == {}
    logits = model.forward(decode(0, blocks=[[1]]), None)
    assert logits is not None
    assert logits.shape == (1, SPEC.vocab)


@pytest.mark.parametrize("most", [1, 2, 7, 16, 33, 128, 200])
def test_graph_sizes_waste_little(most: int) -> None:
    sizes = graph_sizes(most)
    assert sizes[-1] == most
    assert list(sizes) == sorted(set(sizes))
    for batch in range(1, most + 1):
        held = min(size for size in sizes if size >= batch)
        assert held - batch < 32


def test_steps_are_bounded_in_time(whole: Part) -> None:
    if whole.device.type != "cuda":
        pytest.skip("only a device can hang")
    model = ShardModel(
        replace(SPEC),
        whole.place,
        random_weights(whole.place, whole.device),
        numerics="native",
        comm=SoloCommunicator(),
        cache=whole.cache,
        timeout_s=0.05,
    )
    plan = decode(0, blocks=[[1]])
    model.draw(model.forward(plan, None), plan)
    torch.cuda._sleep(2_000_000_000)  # about a second of device time
    with pytest.raises(TimeoutError, match="did not finish"):
        model.draw(model.forward(plan, None), plan)
    torch.cuda.synchronize()


def test_a_model_goes_as_soon_as_nobody_holds_it() -> None:
    """Its memory is wanted for the next layout, and destroying recordings in the middle of a step would show."""
    place, cpu = Place((0, 2), 0, 1, first=True, last=True), torch.device("cpu")
    cache = KvCache((0, 2), (0, 1), SPEC.head_dim, BLOCKS, BLOCK_TOKENS, torch.float32, cpu)
    weights = random_weights(place, cpu)
    model = ShardModel(SPEC, place, weights, numerics="native", comm=SoloCommunicator(), cache=cache)
    model._graphs = model._recordings(rerun)
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
