"""The two sides of the decode and prefill benchmarks: our runner over a block pool, and plain transformers."""

import time
from collections.abc import Sequence
from itertools import count, islice

import torch
from transformers import DynamicCache, PreTrainedModel

from worker.allocator import keep_freed_memory
from worker.config import WorkerConfig
from worker.engine.step import Chunk
from worker.ids import BlockId
from worker.model.load import LoadedModel, load_model
from worker.model.presets import preset_config, random_model
from worker.model.runner import ModelRunner
from worker.tiers.kv_cache import KVCache


def load_both(preset: str) -> tuple[LoadedModel, PreTrainedModel]:
    """The model as we serve it, and the same weights in transformers with the attention that it would choose.

    Both in a process that keeps freed memory, as a worker does.
    """
    keep_freed_memory()
    ours = load_model(WorkerConfig(model=f"preset:{preset}"))
    theirs = random_model(preset_config(preset), ours.model.dtype, seed=0).to(ours.device).eval()
    theirs.set_attn_implementation("sdpa")
    return ours, theirs


class Ours:
    """Sequences in blocks of a pool of their own, filled with random KV (which costs what real KV would)."""

    def __init__(self, loaded: LoadedModel, batch: int, max_tokens: int) -> None:
        """Room for `batch` sequences of `max_tokens`, or unequally long ones of as many in all."""
        self._loaded, self._batch = loaded, batch
        cache = KVCache(loaded.layout, batch * (self._num_blocks(max_tokens) + 1), loaded.device)
        self._runner = ModelRunner(loaded, cache)
        for layer in cache.data:
            layer.normal_()

    def decode(self, context: int | Sequence[int], steps: int) -> float:
        """Seconds for `steps` greedy steps of all sequences, all or each of so many tokens at first."""
        contexts = [context] * self._batch if isinstance(context, int) else context
        tables = self._deal([first + steps for first in contexts])
        tokens = [1] * self._batch
        began = time.perf_counter()
        for step in range(steps):
            chunks = [
                Chunk([token], first + step, table, wants_logits=True)
                for token, first, table in zip(tokens, contexts, tables, strict=True)
            ]
            tokens = self._runner.run(chunks).argmax(-1).tolist()
        return time.perf_counter() - began

    def prefill(self, prompt: Sequence[int], chunk_tokens: int) -> float:
        """Seconds to the logits of a prompt's last token, in chunks as the engine would run it."""
        (table,) = self._deal([len(prompt)])
        began = time.perf_counter()
        for start in range(0, len(prompt), chunk_tokens):
            part = prompt[start : start + chunk_tokens]
            last = start + len(part) == len(prompt)
            self._runner.run([Chunk(part, start, table, wants_logits=last)]).argmax(-1).tolist()
        return time.perf_counter() - began

    def _deal(self, lengths: Sequence[int]) -> list[list[BlockId]]:
        """Each sequence's blocks, one sequence's behind the other's."""
        blocks = map(BlockId, count())
        return [list(islice(blocks, self._num_blocks(length))) for length in lengths]

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._loaded.layout.block_tokens)


class Theirs:
    """Sequences of equal length in one batch with a DynamicCache: what `generate` does at each step."""

    def __init__(self, model: PreTrainedModel, batch: int) -> None:
        self._model, self._batch = model, batch

    def decode(self, context: int, steps: int) -> float:
        cache = self._filled_cache(context)
        tokens = torch.ones(self._batch, 1, dtype=torch.long, device=self._model.device)
        began = time.perf_counter()
        with torch.inference_mode():
            for _ in range(steps):
                logits = self._model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
                tokens = logits.argmax(-1)
                tokens.tolist()
        return time.perf_counter() - began

    def prefill(self, prompt: Sequence[int]) -> float:
        tokens = torch.tensor([prompt], device=self._model.device)
        began = time.perf_counter()
        with torch.inference_mode():
            logits = self._model(input_ids=tokens, use_cache=True, logits_to_keep=1).logits
            logits.argmax(-1).tolist()
        return time.perf_counter() - began

    def _filled_cache(self, context: int) -> DynamicCache:
        config = self._model.config
        shape = (self._batch, config.num_key_value_heads, context, config.head_dim)
        cache = DynamicCache(config=config)
        for layer in range(config.num_hidden_layers):
            keys, values = (torch.empty(shape, dtype=self._model.dtype, device=self._model.device) for _ in range(2))
            cache.update(keys.normal_(), values.normal_(), layer)
        return cache


def random_prompt(num_tokens: int, vocab_size: int, seed: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(2, vocab_size, (num_tokens,), generator=generator).tolist()
    return tokens
