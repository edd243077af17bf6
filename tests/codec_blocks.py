"""Blocks for the codecs' tests: made up or a model's own, in a poisoned pool, there and back through a codec."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_store.layout import KVLayout
from tests.tiny_models import VOCAB_SIZE, save_tiny_model
from worker.config import WorkerConfig
from worker.engine.step import Chunk
from worker.ids import BlockId
from worker.model.load import LoadedModel, load_model
from worker.model.runner import ModelRunner
from worker.tiers.codecs.codec import Codec
from worker.tiers.codecs.rope import Rope
from worker.tiers.kv_cache import KVCache

CPU = torch.device("cpu")
CUDA = pytest.param(
    torch.device("cuda"),
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
    id="cuda",
)
DTYPES = ("bfloat16", "float16", "float32")
BITS = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}


def layout_of(
    num_layers: int = 2, num_kv_heads: int = 2, head_dim: int = 64, block_tokens: int = 64, dtype: str = "bfloat16"
) -> KVLayout:
    return KVLayout(
        num_layers=num_layers, num_kv_heads=num_kv_heads, head_dim=head_dim, block_tokens=block_tokens, dtype=dtype
    )


def llama_rope(head_dim: int, base: float = 10_000.0) -> Rope:
    return Rope(base ** (-np.arange(head_dim // 2) / (head_dim // 2)))


def normal_block(layout: KVLayout, seed: int = 0, device: torch.device = CPU) -> torch.Tensor:
    """A block in a pool that has others before and after it."""
    layers, _, heads, tokens, dim = layout.block_shape
    pool = torch.randn(layers, 2, heads, 3 * tokens, dim, generator=torch.Generator().manual_seed(seed))
    return pool.to(getattr(torch, layout.dtype)).to(device)[:, :, :, tokens : 2 * tokens]


def encode(codec: Codec, kv: torch.Tensor, *, num_tokens: int | None = None, first_position: int = 64) -> memoryview:
    """The payload; what comes after it in the buffer must be as it was."""
    buffer = bytearray(b"\xa5" * kv.nbytes)
    tokens = kv.shape[3] if num_tokens is None else num_tokens
    num_bytes = codec.encode(kv, memoryview(buffer), num_tokens=tokens, first_position=first_position)
    assert 0 < num_bytes <= kv.nbytes
    assert buffer[num_bytes:] == b"\xa5" * (kv.nbytes - num_bytes)
    return memoryview(bytes(buffer[:num_bytes]))


def decode(
    codec: Codec, payload: memoryview, like: torch.Tensor, *, num_tokens: int | None = None, first_position: int = 64
) -> torch.Tensor:
    """The block, decoded into the middle of a pool of NaN, of which nothing else may change."""
    layers, _, heads, tokens, dim = like.shape
    pool = torch.full((layers, 2, heads, 3 * tokens, dim), torch.nan, dtype=like.dtype, device=like.device)
    kv = pool[:, :, :, tokens : 2 * tokens]
    codec.decode(payload, kv, num_tokens=num_tokens or tokens, first_position=first_position)
    assert bool(pool[:, :, :, :tokens].isnan().all())
    assert bool(pool[:, :, :, 2 * tokens :].isnan().all())
    return kv


def load_tiny(directory: Path, architecture: str, *, dtype: str = "auto", block_tokens: int = 16) -> LoadedModel:
    checkpoint = save_tiny_model(directory / architecture, architecture)
    return load_model(WorkerConfig(model=str(checkpoint), dtype=dtype, block_tokens=block_tokens, device="cpu"))


def filled_cache(loaded: LoadedModel, num_blocks: int, *, seed: int = 0) -> KVCache:
    """The KV that a model computes of random tokens, block after block."""
    cache = KVCache(loaded.layout, num_blocks, loaded.device)
    runner = ModelRunner(loaded, cache)
    numbers = random.Random(seed)
    tokens = [numbers.randrange(2, VOCAB_SIZE) for _ in range(num_blocks * loaded.layout.block_tokens)]
    runner.run([Chunk(tokens, 0, [BlockId(block) for block in range(num_blocks)], wants_logits=True)])
    return cache
