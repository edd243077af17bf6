"""What a conversation with inserted KV should come to, computed the slow way: no blocks, no batch, no tiers."""

from collections.abc import Sequence
from typing import Any

import torch

from cache_store.inserts import Inserts
from worker.attention.paged import exact_attention
from worker.tiers.codecs.rope import Rope


class Reference:
    """One conversation of a model that has this engine's attention."""

    def __init__(self, model: Any, rope: Rope, num_layers: int) -> None:
        self._model, self._rope, self._num_layers = model, rope, num_layers
        self._keys: list[torch.Tensor] = []  # of each layer [kv_heads, tokens, head_dim]
        self._values: list[torch.Tensor] = []
        self._forget()

    def logits_after(self, tokens: Sequence[int], inserts: Inserts) -> torch.Tensor:
        """Of the next token."""
        alone = [self._alone(tokens[insert.start : insert.end]) for insert in inserts.all]
        self._forget()
        at = 0
        for insert, kv in zip(inserts.all, alone, strict=True):
            self._forward(tokens[at : insert.linked], at)
            for layer, (keys, values) in enumerate(kv):
                turned = keys[:, insert.linked - insert.start :].clone()
                self._rope.turn(insert.start, 1, turned.device).apply(turned)
                self._keys[layer] = torch.cat([self._keys[layer], turned], 1)
                self._values[layer] = torch.cat([self._values[layer], values[:, insert.linked - insert.start :]], 1)
            at = insert.end
        return self._forward(tokens[at:], at)

    def _alone(self, tokens: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        self._forget()
        self._forward(tokens, 0)
        return list(zip(self._keys, self._values, strict=True))

    def _forget(self) -> None:
        self._keys, self._values = ([torch.empty(0)] * self._num_layers for _ in range(2))

    def _forward(self, tokens: Sequence[int], start: int) -> torch.Tensor:
        self._start = start
        places = torch.arange(start, start + len(tokens))[None]
        with torch.inference_mode():
            output = self._model(
                input_ids=torch.tensor([list(tokens)]), position_ids=places, use_cache=False, step=self
            )
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, *, scaling: float, window: Any, softcap: Any
    ) -> Any:
        layer = module.layer_idx
        self._keys[layer] = torch.cat([self._keys[layer], key[0]], 1) if self._start else key[0]
        self._values[layer] = torch.cat([self._values[layer], value[0]], 1) if self._start else value[0]
        attended = exact_attention(
            query[0],
            self._keys[layer],
            self._values[layer],
            start=self._start,
            key_positions=torch.arange(self._keys[layer].shape[1]),
            scaling=scaling,
            window=window,
            softcap=softcap,
        )
        return attended[None]
