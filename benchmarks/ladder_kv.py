"""Real KV of a model, in every codec: what it computes of the project's own dialogues."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from benchmarks.codec_kv import dialogue_tokens, prefill
from cache_store.codecs import CodecInfo
from cache_store.layout import KVLayout
from worker.config import WorkerConfig
from worker.ids import BlockId
from worker.model.load import load_model
from worker.model.runner import ModelRunner
from worker.tiers.ageing import Shrink
from worker.tiers.codecs import open_codecs
from worker.tiers.kv_cache import KVCache
from worker.tiers.shrink import Shrinker


class EncodedKV(NamedTuple):
    layout: KVLayout
    payloads: Mapping[CodecInfo, Sequence[memoryview]]
    """The same consecutive blocks, from a conversation's first on, in each codec."""
    shrink: Shrink

    def mean_bytes(self, codec: CodecInfo) -> float:
        sizes = [payload.nbytes for payload in self.payloads[codec]]
        return sum(sizes) / len(sizes)


def encode_kv(model: str, *, block_tokens: int, blocks: int) -> EncodedKV:
    """Raises ModelRefused."""
    loaded = load_model(WorkerConfig(model=model, block_tokens=block_tokens))
    layout = loaded.layout
    num_tokens = min(blocks * block_tokens, loaded.max_context_tokens // block_tokens * block_tokens)
    table = [BlockId(block) for block in range(num_tokens // block_tokens)]
    cache = KVCache(layout, len(table), loaded.device)
    runner = ModelRunner(loaded, cache)
    prefill(runner, dialogue_tokens(model, loaded.vocab_size, num_tokens), table)
    codecs = open_codecs(layout, loaded.rope, loaded.device)
    buffer = memoryview(bytearray(layout.block_bytes))
    payloads: dict[CodecInfo, list[memoryview]] = {codec.info: [] for codec in codecs.values()}
    for codec in codecs.values():
        for block in table:
            num_bytes = codec.encode(
                cache.view(block), buffer, num_tokens=block_tokens, first_position=block * block_tokens
            )
            payloads[codec.info].append(memoryview(bytes(buffer[:num_bytes])))
    return EncodedKV(layout, payloads, Shrinker(layout, open_codecs(layout, loaded.rope, torch.device("cpu"))))
