"""A model's own KV for measuring codecs: blocks that it computed, and what it says when they were lossy."""

from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.bare_models import random_prompt
from models.dialogues import held_out
from worker.chat import ChatMessage
from worker.config import WorkerConfig
from worker.engine.step import Chunk
from worker.ids import BlockId
from worker.model.load import LoadedModel, load_model
from worker.model.runner import ModelRunner
from worker.model.shipped import locate
from worker.text import load_tokenizer
from worker.tiers.codecs.codec import Codec
from worker.tiers.kv_cache import KVCache

_STEP_TOKENS = 256
_SAID_TOKENS = 256
"""How many tokens after the blocks are compared."""


class ModelKV:
    """The full blocks of one conversation, from its first token on."""

    def __init__(self, model: str, num_tokens: int, *, seed: int = 0) -> None:
        """Of the project's dialogues where `model` is a checkpoint, of random tokens where it is a preset."""
        self.loaded: LoadedModel = load_model(WorkerConfig(model=model))
        self.block_tokens = self.loaded.layout.block_tokens
        self._num_tokens = num_tokens // self.block_tokens * self.block_tokens
        num_blocks = self._num_tokens // self.block_tokens
        self._table = [BlockId(block) for block in range(num_blocks + -(-_SAID_TOKENS // self.block_tokens))]
        self._tokens = _tokens(model, self.loaded.vocab_size, self._num_tokens + _SAID_TOKENS, seed)
        cache = KVCache(self.loaded.layout, len(self._table), self.loaded.device)
        self._cache, self._runner = cache, ModelRunner(self.loaded, cache)
        prefill(self._runner, self._tokens[: self._num_tokens], self._table)
        self.blocks = [cache.view(BlockId(block)) for block in range(num_blocks)]
        self._aside = KVCache(self.loaded.layout, 3, self.loaded.device).view(BlockId(1))
        self._said = self._say()
        self._exact = cache.data.clone()

    def encode(self, codec: Codec) -> list[bytes]:
        """Every block's payload."""
        buffer = memoryview(bytearray(self.loaded.layout.block_bytes))
        return [
            bytes(buffer[: codec.encode(kv, buffer, num_tokens=self.block_tokens, first_position=first)])
            for first, kv in self._firsts()
        ]

    def decode(self, codec: Codec, payloads: Sequence[bytes]) -> None:
        """Every payload, into a block aside."""
        for (first, _), payload in zip(self._firsts(), payloads, strict=True):
            codec.decode(memoryview(payload), self._aside, num_tokens=self.block_tokens, first_position=first)

    def cost(self, codec: Codec) -> tuple[float, float]:
        """Of blocks that went through `codec`: the keys' relative error, and the mean KL(exact || with them) in nats of
        the next tokens. Leaves the blocks as they were."""
        for (first, kv), payload in zip(self._firsts(), self.encode(codec), strict=True):
            codec.decode(memoryview(payload), kv, num_tokens=self.block_tokens, first_position=first)
        error = (self._cache.data[:, 0].float() - self._exact[:, 0].float()).norm() / self._exact[:, 0].float().norm()
        lossy = self._say()
        self._cache.data.copy_(self._exact)
        divergence = (self._said.exp() * (self._said - lossy)).sum(-1).mean()
        return float(error), float(divergence)

    def _firsts(self) -> list[tuple[int, torch.Tensor]]:
        return [(number * self.block_tokens, kv) for number, kv in enumerate(self.blocks)]

    def _say(self) -> torch.Tensor:
        """Log-probabilities [tokens, vocabulary] after each token that follows the blocks."""
        # A step writes the KV of all its chunks before any of them attends: so these see each other as in one sequence.
        chunks = [
            Chunk([self._tokens[at]], at, self._table, wants_logits=True)
            for at in range(self._num_tokens, self._num_tokens + _SAID_TOKENS)
        ]
        return self._runner.run(chunks).log_softmax(-1)


def is_checkpoint(model: str) -> bool:
    return Path(locate(model)).is_dir()


def _tokens(model: str, vocab_size: int, num_tokens: int, seed: int) -> list[int]:
    if is_checkpoint(model):
        return dialogue_tokens(model, vocab_size, num_tokens, seed=seed)
    return random_prompt(num_tokens, vocab_size, seed)


def dialogue_tokens(model: str, vocab_size: int, num_tokens: int, *, seed: int = 0) -> list[int]:
    """A chat of dialogues that no training has seen, one after the other, as the server would send it."""
    turns = [turn for dialogue in held_out(32, seed=seed, max_tokens=num_tokens) for turn in dialogue.turns]
    messages = [
        ChatMessage(role=role, content=text)
        for turn in turns
        for role, text in (("user", turn.user), ("assistant", turn.reply))
    ]
    tokens = list(load_tokenizer(model, vocab_size).encode_chat(messages, ()).token_ids)
    assert len(tokens) >= num_tokens, f"the dialogues have {len(tokens)} tokens, {num_tokens} are wanted"
    return tokens[:num_tokens]


def prefill(runner: ModelRunner, tokens: Sequence[int], table: list[BlockId]) -> None:
    """Write the KV of `tokens`, a conversation's first, into the blocks of `table`."""
    for start in range(0, len(tokens), _STEP_TOKENS):
        runner.run([Chunk(list(tokens[start : start + _STEP_TOKENS]), start, table, wants_logits=False)])
