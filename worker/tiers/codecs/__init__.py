"""How a block's KV becomes the bytes that every tier below the device keeps, and KV again."""

from collections.abc import Mapping

import torch

from cache_store.codecs import INT4, INT8, K8V4
from cache_store.layout import KVLayout
from worker.tiers.codecs.codec import Codec
from worker.tiers.codecs.dequantize import load_dequantizer
from worker.tiers.codecs.exact import LosslessCodec, RawCodec
from worker.tiers.codecs.quantized import QuantizedCodec
from worker.tiers.codecs.rope import Rope


def open_codecs(layout: KVLayout, rope: Rope | None, device: torch.device) -> Mapping[str, Codec]:
    """Every codec by name, for blocks of `layout` on `device`. `rope` is the model's, if it is known (`rope_of`)."""
    codecs: list[Codec] = [RawCodec(layout, device), LosslessCodec(layout, device)]
    dequantizer = load_dequantizer() if device.type == "cpu" else None
    codecs += [QuantizedCodec(info, layout, rope, device, dequantizer) for info in (INT8, K8V4, INT4)]
    return {codec.info.name: codec for codec in codecs}
