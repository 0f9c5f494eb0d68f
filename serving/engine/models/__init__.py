"""Decoders: one class per family of architectures, each building its layers from the parts of a place."""

from serving.engine.kv_cache import KvCache
from serving.engine.layers import Parts
from serving.engine.models.base import Decoder
from serving.engine.models.opt import OptDecoder
from serving.engine.models.rotary import RotaryDecoder

__all__ = ["Decoder", "OptDecoder", "RotaryDecoder", "make_decoder"]


def make_decoder(parts: Parts, cache: KvCache) -> Decoder:
    """The decoder of the model's family."""
    return OptDecoder(parts, cache) if parts.spec.family == "opt" else RotaryDecoder(parts, cache)
