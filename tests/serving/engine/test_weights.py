import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from data.errors import CorruptData, InvalidInput, PerennialError, UnsupportedModel
from data.layout import ParallelConfig, Position
from serving.engine.checkpoint import create_checkpoint
from serving.engine.place import Place
from serving.engine.weights import CheckpointReader, load_weights, read_spec


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model"
    create_checkpoint(
        str(path), family="qwen2", layers=2, hidden=32, ffn=52, vocab=301, max_positions=32, max_shard_bytes=40_000
    )
    return path


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


def load_all(checkpoint: Path) -> dict[str, torch.Tensor]:
    spec = read_spec(str(checkpoint))
    place = Place.of(spec, ParallelConfig(1, 1, 1, 1), Position(0, 0, 0))
    return load_weights(str(checkpoint), spec, place, dtype=torch.float32, device="cpu")


def shard_file(checkpoint: Path) -> Path:
    return sorted(checkpoint.glob("model-*.safetensors"))[1]


def test_the_places_of_a_layout_hold_every_element(pristine: Path) -> None:
    spec, whole = read_spec(str(pristine)), load_all(pristine)
    config = ParallelConfig(1, 2, 3, 1)
    held = {name: torch.zeros(tensor.shape, dtype=torch.bool) for name, tensor in whole.items()}
    for position in config.positions():
        place = Place.of(spec, config, position)
        weights = load_weights(str(pristine), spec, place, dtype=torch.float32, device="cpu")
        for tensor, start, stop in place.boxes(spec):
            box = tuple(slice(*ends) for ends in zip(start, stop, strict=True))
            assert torch.equal(weights[tensor.name], whole[tensor.name][box])
            held[tensor.name][box] = True
    assert all(mask.all() for mask in held.values())


def test_boxes(pristine: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    whole = load_all(pristine)[name]
    with CheckpointReader(str(pristine)) as reader:
        assert name in reader.names
        assert torch.equal(reader.read(name, (3, 0), (7, 32)), whole[3:7])
        assert torch.equal(reader.read(name, (0, 5), (2, 9)), whole[:2, 5:9])


def lose_shard(checkpoint: Path) -> None:
    shard_file(checkpoint).unlink()


def truncate(checkpoint: Path) -> None:
    file = shard_file(checkpoint)
    file.write_bytes(file.read_bytes()[:-100])


def truncate_header(checkpoint: Path) -> None:
    file = shard_file(checkpoint)
    file.write_bytes(file.read_bytes()[:20])


def empty(checkpoint: Path) -> None:
    shard_file(checkpoint).write_bytes(b"")


def lose_tensor(checkpoint: Path) -> None:
    index = checkpoint / "model.safetensors.index.json"
    value = json.loads(index.read_text())
    del value["weight_map"]["model.norm.weight"]
    index.write_text(json.dumps(value))


def lose_listed_tensor(checkpoint: Path) -> None:
    tensors = load_file(shard_file(checkpoint))
    tensors.popitem()
    save_file(tensors, shard_file(checkpoint))


def reshape(checkpoint: Path) -> None:
    for file in checkpoint.glob("model-*.safetensors"):
        tensors = load_file(file)
        if "model.norm.weight" in tensors:
            tensors["model.norm.weight"] = torch.zeros(31)
            save_file(tensors, file)


def break_index(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text('{"weight_map": ')


def lose_map(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors.index.json").write_text("{}")


def only_bin(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()
    (checkpoint / "pytorch_model.bin").write_bytes(b"x")


def no_weights(checkpoint: Path) -> None:
    for file in checkpoint.glob("model*"):
        file.unlink()


def no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()


def half_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"architectures": [')


def other_architecture(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text('{"architectures": ["MambaForCausalLM"]}')


def wrong_kind(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))


@pytest.mark.parametrize(
    ("damage", "error", "words"),
    [
        (lose_shard, CorruptData, "lacks the file"),
        (truncate, CorruptData, "not a complete safetensors file"),
        (truncate_header, CorruptData, "not a complete safetensors file"),
        (empty, CorruptData, "not a complete safetensors file"),
        (lose_tensor, CorruptData, "lacks the tensor model.norm.weight"),
        (lose_listed_tensor, CorruptData, "lacks the tensor"),
        (reshape, CorruptData, r"shape \(31,\)"),
        (break_index, CorruptData, "not readable JSON"),
        (lose_map, CorruptData, "no weight_map"),
        (only_bin, InvalidInput, "convert it to safetensors"),
        (no_weights, InvalidInput, "has no model.safetensors"),
        (no_config, InvalidInput, "no config.json"),
        (half_config, CorruptData, "not readable JSON"),
        (other_architecture, UnsupportedModel, "MambaForCausalLM"),
        (wrong_kind, CorruptData, "wrong kind"),
    ],
)
def test_damaged_checkpoints_are_named(
    checkpoint: Path, damage: object, error: type[PerennialError], words: str
) -> None:
    assert callable(damage)
    damage(checkpoint)
    with pytest.raises(error, match=words) as caught:
        load_all(checkpoint)
    assert "\n" not in str(caught.value)


def test_a_path_that_is_no_directory() -> None:
    with pytest.raises(InvalidInput, match="not a directory"):
        read_spec("/nowhere/at/all")
