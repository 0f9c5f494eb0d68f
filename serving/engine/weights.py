"""Reading checkpoints: safetensors only, whole or sharded, and of every tensor only the part wanted."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data.errors import CorruptData, InvalidInput
from data.models import ModelSpec, tensors
from serving.engine.place import Place

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"


def read_spec(checkpoint: str) -> ModelSpec:
    """The model's geometry from `config.json`; end-of-sequence ids from `generation_config.json` if it has any.

    Raises `InvalidInput` or `CorruptData` with a sentence for the user.
    """
    directory = Path(checkpoint)
    if not directory.is_dir():
        raise InvalidInput(f"checkpoint {checkpoint} is not a directory; give the folder that holds config.json")
    if not (directory / "config.json").is_file():
        raise InvalidInput(f"checkpoint {checkpoint} has no config.json; give a Hugging Face model folder")
    config = _read_json(directory / "config.json")
    generation = directory / "generation_config.json"
    if generation.is_file() and (eos := _read_json(generation).get("eos_token_id")) is not None:
        config["eos_token_id"] = eos
    try:
        return ModelSpec.from_hf_config(config, name=directory.resolve().name)
    except (TypeError, ValueError) as error:
        raise CorruptData(f"config.json of {checkpoint} holds a value of the wrong kind: {error}") from error


class CheckpointReader:
    """Keeps the files of a checkpoint open and reads boxes of its tensors.

    Raises `InvalidInput` where there is no safetensors checkpoint, `CorruptData` where one is
    incomplete: a missing shard file, a truncated file, a tensor that is missing or misshapen.
    """

    def __init__(self, checkpoint: str) -> None:
        self._directory = Path(checkpoint)
        self._handles: dict[str, Any] = {}
        self._file_of = self._find_tensors()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        self._handles.clear()

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def read(self, name: str, start: Sequence[int], stop: Sequence[int], shape: Sequence[int] | None = None) -> Tensor:
        """The box `start` ≤ index < `stop` of a tensor, contiguous, on the CPU, in its stored dtype.

        `shape` is what the whole tensor should measure; without it any is accepted.
        """
        view = self._slice(name, shape)
        tensor: Tensor = view[tuple(slice(low, high) for low, high in zip(start, stop, strict=True))]
        return tensor.contiguous()

    def verify(self, spec: ModelSpec) -> None:
        """Look whether every tensor of a model is there in full, without reading any."""
        for tensor in tensors(spec):
            self._slice(tensor.name, tensor.shape)

    def _slice(self, name: str, shape: Sequence[int] | None) -> Any:
        try:
            view = self._open(self._file_of[name]).get_slice(name)
        except (KeyError, SafetensorError) as error:
            raise CorruptData(f"checkpoint {self._directory} lacks the tensor {name}; copy it again") from error
        stored = tuple(view.get_shape())
        if shape is not None and stored != tuple(shape):
            raise CorruptData(f"tensor {name} of {self._directory} has shape {stored}, config.json says {tuple(shape)}")
        return view

    def _find_tensors(self) -> dict[str, str]:
        if (self._directory / _INDEX).is_file():
            return self._read_index()
        if (self._directory / _SINGLE).is_file():
            return dict.fromkeys(self._open(_SINGLE).keys(), _SINGLE)
        if any(self._directory.glob("*.bin")):
            raise InvalidInput(f"checkpoint {self._directory} holds only .bin files; convert it to safetensors first")
        raise InvalidInput(f"checkpoint {self._directory} has no {_SINGLE} and no {_INDEX}; is the path right?")

    def _read_index(self) -> dict[str, str]:
        weight_map = _read_json(self._directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise CorruptData(f"{self._directory / _INDEX} has no weight_map; copy the checkpoint again")
        missing = sorted(file for file in set(weight_map.values()) if not (self._directory / file).is_file())
        if missing:
            raise CorruptData(f"checkpoint {self._directory} lacks the file {missing[0]}; copy it again")
        return {str(name): str(file) for name, file in weight_map.items()}

    def _open(self, file: str) -> Any:
        if file not in self._handles:
            try:
                self._handles[file] = safe_open(self._directory / file, framework="pt")
            except (SafetensorError, OSError) as error:
                raise CorruptData(
                    f"{self._directory / file} is not a complete safetensors file ({error}); copy it again"
                ) from error
        return self._handles[file]


def load_weights(
    checkpoint: str, spec: ModelSpec, place: Place, *, dtype: torch.dtype, device: torch.device | str
) -> dict[str, Tensor]:
    """The parts of all tensors that `place` holds, under their Hugging Face names.

    Raises the errors of `CheckpointReader`.
    """
    with CheckpointReader(checkpoint) as reader:
        return {
            tensor.name: reader.read(tensor.name, start, stop, tensor.shape).to(device=device, dtype=dtype)
            for tensor, start, stop in place.boxes(spec)
        }


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CorruptData(f"{path} is not readable JSON ({error}); copy the checkpoint again") from error
    if not isinstance(value, dict):
        raise CorruptData(f"{path} is not a JSON object; copy the checkpoint again")
    return value
