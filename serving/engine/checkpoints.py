"""The models that are served, by name: their geometry, and their tensors under names that tell them apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor

from data.deployment import split_name
from data.models import ModelSpec
from serving.engine.weights import CheckpointReader, read_spec


class Checkpoints:
    """`paths` are checkpoint folders by model name; the only model of a fleet has the name "".

    Raises the errors of `read_spec` and `CheckpointReader`.
    """

    def __init__(self, paths: Mapping[str, str]) -> None:
        self.specs: dict[str, ModelSpec] = {}
        for name, path in paths.items():
            spec = read_spec(path)
            self.specs[name] = replace(spec, name=name) if name else spec
        self._readers = {name: CheckpointReader(path) for name, path in paths.items()}

    def read(self, tensor: str, start: Sequence[int], stop: Sequence[int]) -> Tensor:
        """A box of a tensor, called as `data.deployment.tensor_name` says; see `CheckpointReader.read`."""
        model, name = split_name(tensor)
        return self._readers[model].read(name, start, stop)

    def verify(self) -> None:
        """Look whether every tensor of every model is there in full, without reading any."""
        for name, reader in self._readers.items():
            reader.verify(self.specs[name])

    def close(self) -> None:
        """Let go of the files."""
        for reader in self._readers.values():
            reader.close()
