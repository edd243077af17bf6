"""Which blocks could spare a prompt its prefill: names and token counts, found nowhere yet. Pure.

`salts` says what names depend on beside tokens, where a conversation is longer than the window or has parts inserted;
None: nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from cache_store.ids import BlockHash, chain, full_block_hashes


class Salts(Protocol):
    """A Beyond, or Inserts."""

    def salt(self, tokens: Sequence[int], start: int, end: int) -> bytes:
        """What KV of `tokens[start:end]` depends on beside those and all before them."""
        ...


@dataclass(frozen=True, slots=True)
class Wanted:
    """A block that would serve positions [index * block_tokens, index * block_tokens + offers) of a prompt."""

    index: int
    name: BlockHash
    content_tokens: int
    """How many tokens the named content has."""
    offers: int
    """How many of them the prompt can use. Less than a whole block: it is copied, as the sequence writes on behind."""


def name_of(parent: BlockHash, tokens: Sequence[int], start: int, end: int, salts: Salts | None) -> BlockHash:
    """The name of the block of `tokens[start:end]`; `tokens` are the conversation's."""
    return chain(parent, tokens[start:end], b"" if salts is None else salts.salt(tokens, start, end))


def full_names(
    root: BlockHash, tokens: Sequence[int], block_tokens: int, salts: Salts | None = None
) -> list[BlockHash]:
    if salts is None:
        return list(full_block_hashes(root, tokens, block_tokens))
    names: list[BlockHash] = []
    for start in range(0, len(tokens) - block_tokens + 1, block_tokens):
        names.append(name_of(names[-1] if names else root, tokens, start, start + block_tokens, salts))
    return names


def tail_of(
    root: BlockHash,
    names: Sequence[BlockHash],
    tokens: Sequence[int],
    num_kv: int,
    block_tokens: int,
    salts: Salts | None = None,
) -> Wanted | None:
    """The unfull block at the end of `tokens[:num_kv]`; None where that ends with a block's end."""
    index, rest = divmod(num_kv, block_tokens)
    if rest == 0:
        return None
    parent, start = names[index - 1] if index else root, index * block_tokens
    return Wanted(index, name_of(parent, tokens, start, num_kv, salts), rest, rest)


def wanted_by_prompt(
    root: BlockHash,
    names: Sequence[BlockHash],
    tokens: Sequence[int],
    num_history: int,
    block_tokens: int,
    salts: Salts | None = None,
) -> list[Wanted]:
    """What to look for, in order, one block an index at the most.

    `names` are those of the full blocks of `tokens`. The last token is always computed: its logits choose the next one.
    A committed history of n tokens has KV for n - 1 (its last token was sampled, never run), so its unfull last block,
    if it was kept, ends there.
    """
    last = len(tokens) - 1
    wanted = [
        Wanted(index, name, block_tokens, min(block_tokens, last - index * block_tokens))
        for index, name in enumerate(names)
        if index * block_tokens < last
    ]
    tail = tail_of(root, names, tokens, num_history - 1, block_tokens, salts) if num_history > 1 else None
    if tail is not None and tail.index * block_tokens + tail.offers <= last:
        return [*wanted[: tail.index], tail, *wanted[tail.index + 1 :]]
    return wanted


def wanted_by_history(
    root: BlockHash, tokens: Sequence[int], block_tokens: int, salts: Salts | None = None
) -> list[Wanted]:
    """All blocks of a committed history (which has KV for all tokens but its last): full ones, and the unfull one."""
    num_kv = max(0, len(tokens) - 1)
    names = full_names(root, tokens, block_tokens, salts)[: num_kv // block_tokens]
    tail = tail_of(root, names, tokens, num_kv, block_tokens, salts)
    wanted = [Wanted(index, name, block_tokens, block_tokens) for index, name in enumerate(names)]
    return wanted if tail is None else [*wanted, tail]
