"""A dialogue as the tokens that the chat template gives it: prompt and reply of each turn."""

from typing import Any

from models.dialogues import Dialogue, Turn


def encode(tokenizer: Any, talk: Dialogue) -> list[tuple[Turn, list[int], list[int]]]:
    """Of each turn: the tokens up to its reply, and the reply's with the end of turn. Before them all comes bos."""
    prompts = _ids(tokenizer, [f"<|user|>{turn.user}<|end|><|assistant|>" for turn in talk.turns])
    replies = _ids(tokenizer, [f"{turn.reply}<|end|>" for turn in talk.turns])
    return list(zip(talk.turns, prompts, replies, strict=True))


def measure(tokenizer: Any, turn: Turn) -> int:
    """A turn's length in tokens."""
    ((_, prompt, reply),) = encode(tokenizer, Dialogue((turn,)))
    return len(prompt) + len(reply)


def _ids(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return ids
