"""What a conversation beyond its window should come to, computed the slow way: no blocks, no batch, no tiers.

Keeps the keys and values of every token as plain tensors, and rebuilds all that is attended to for each stage.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from worker.attention.paged import exact_attention
from worker.attention.recall_choice import represent, shares
from worker.engine.epochs import Beyond
from worker.engine.recollection import Choice, Recollection
from worker.engine.stages import Stage, next_stage
from worker.tiers.codecs.codec import Codec
from worker.tiers.codecs.rope import Rope


class Reference:
    """One conversation of a model that has this engine's attention."""

    def __init__(self, model: Any, rope: Rope, beyond: Beyond, num_layers: int) -> None:
        self.beyond = beyond
        self._model, self._rope, self._num_layers = model, rope, num_layers
        self._keys: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]  # of each token [kv_heads, head_dim]
        self._values: list[list[torch.Tensor]] = [[] for _ in range(num_layers)]
        self.choice: Choice = np.zeros((num_layers, 0, 0), dtype=np.int64)
        self.num_asked = 0
        """Times that tokens were run again."""
        self._num_coded = 0
        """Tokens that have gone through a codec: none does so twice."""
        self._recollection = self._new_recollection()
        self._queries: list[torch.Tensor] = []

    def logits_after(self, tokens: Sequence[int], bounds: tuple[int, ...]) -> torch.Tensor:
        """Of the next token after all of `tokens`; those that were computed before are not computed again."""
        self.beyond = Beyond(self.beyond.epochs, bounds)
        start, logits = len(self._keys[0]), torch.empty(0)
        while start < len(tokens):
            stage = next_stage(self.beyond, start, len(tokens))
            logits = self._run(tokens, start, stage)
            start = stage.end
        return logits

    def resume(self, codec: Codec) -> None:
        """Another worker goes on with it: of each full block there is what the codec gives back, of the rest all."""
        epochs = self.beyond.epochs
        size = epochs.block_tokens
        for start in range(self._num_coded, len(self._keys[0]) // size * size, size):
            span, where = slice(start, start + size), {"num_tokens": size, "first_position": epochs.place_of(start)}
            by_layer = zip(self._keys, self._values, strict=True)
            kv = torch.stack([torch.stack([torch.stack(of[span], 1) for of in both]) for both in by_layer])
            payload = memoryview(bytearray(kv.nbytes))
            codec.decode(payload[: codec.encode(kv, payload, **where)], kv, **where)
            for layer, (keys, values) in enumerate(kv):
                self._keys[layer][span], self._values[layer][span] = keys.unbind(1), values.unbind(1)
            self._num_coded = start + size
        self._recollection = self._new_recollection()

    def _new_recollection(self) -> Recollection:
        epochs = self.beyond.epochs
        return Recollection(epochs.sink_tokens // epochs.unit_tokens, epochs.num_slots, self._undone, shares)

    def _run(self, tokens: Sequence[int], start: int, stage: Stage) -> torch.Tensor:
        self._know(start)
        if stage.forgets:
            self.choice = self._recollection.latest()
        logits = self._forward(tokens, start, stage.end)
        if not (stage.asks or stage.hears):
            return logits
        first = max(start, stage.end - self.beyond.epochs.asking_tokens) if stage.hears else start
        for layer, queries in enumerate(self._queries):
            self._recollection.hear(layer, self.beyond.epochs.place_of(first), queries[:, first - start :])
        if stage.hears:
            self.choice = self._recollection.choose()
            return logits
        choice = self._recollection.amend(self.choice) if stage.is_reply else self._recollection.choose()
        if choice is None:
            return logits
        self.choice = choice
        self.num_asked += 1
        for layer in range(self._num_layers):
            del self._keys[layer][start:], self._values[layer][start:]
        return self._forward(tokens, start, stage.end)

    def _know(self, start: int) -> None:
        """Representatives of all that is gone."""
        epochs = self.beyond.epochs
        epoch = epochs.epoch_of(start)
        if not self.beyond.chooses or not epoch:
            return
        known, end = self._recollection.next_unit * epochs.unit_tokens, epochs.gone(epoch).end
        if known < end:
            free = torch.stack([self._free(layer, known, end) for layer in range(self._num_layers)])
            self._recollection.add(represent(free, epochs.unit_tokens))

    def _free(self, layer: int, start: int, end: int) -> torch.Tensor:
        """Keys before their positions, [kv_heads, tokens, head_dim]."""
        place_of, keys = self.beyond.epochs.place_of, self._keys[layer]
        return torch.stack([self._turned(keys[at], -place_of(at)) for at in range(start, end)], 1)

    def _undone(self, queries: torch.Tensor, first_place: int) -> torch.Tensor:
        rows = [self._turned_all(queries[..., at, :], -first_place - at) for at in range(queries.shape[-2])]
        return torch.stack(rows, -2)

    def _turned_all(self, queries: torch.Tensor, by: int) -> torch.Tensor:
        """[..., head_dim] turned by so many positions."""
        flat = queries.reshape(-1, queries.shape[-1])
        return self._turned(flat, by).view(queries.shape)

    def _turned(self, keys: torch.Tensor, by: int) -> torch.Tensor:
        """[heads, head_dim] turned by so many positions."""
        turned = keys.clone()[:, None]
        self._rope.turn(by, 1, turned.device).apply(turned)
        return turned[:, 0]

    def _forward(self, tokens: Sequence[int], start: int, end: int) -> torch.Tensor:
        epochs = self.beyond.epochs
        ids = torch.tensor([list(tokens[start:end])])
        places = torch.tensor([[epochs.place_of(position) for position in range(start, end)]])
        self._queries = [torch.empty(0)] * self._num_layers
        self._start = start
        with torch.inference_mode():
            output = self._model(input_ids=ids, position_ids=places, use_cache=False, step=self)
        logits: torch.Tensor = output.logits[0, -1].float()
        return logits

    def attend(
        self, module: Any, query: Any, key: Any, value: Any, *, scaling: float, window: Any, softcap: Any
    ) -> Any:
        layer, start = module.layer_idx, self._start
        first_place = self.beyond.epochs.place_of(start)
        self._queries[layer] = query[0]
        self._keys[layer] += list(key[0].unbind(1))
        self._values[layer] += list(value[0].unbind(1))
        seen = self._seen(layer, start, start + query.shape[2])
        attended = exact_attention(
            query[0],
            torch.stack([keys for _, keys, _ in seen], 1),
            torch.stack([values for _, _, values in seen], 1),
            start=first_place,
            key_positions=torch.tensor([place for place, _, _ in seen]),
            scaling=scaling,
            window=window,
            softcap=softcap,
        )
        return attended[None]

    def _seen(self, layer: int, start: int, end: int) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
        """Place, key and value of all that tokens [start, end) attend to."""
        epochs, keys, values = self.beyond.epochs, self._keys[layer], self._values[layer]
        epoch = epochs.epoch_of(start)
        if epoch == 0:
            return [(position, keys[position], values[position]) for position in range(end)]
        seen = [(position, keys[position], values[position]) for position in range(epochs.sink_tokens)]
        for slot in range(epochs.num_slots):
            for at in range(epochs.unit_tokens):
                place = epochs.sink_tokens + slot * epochs.unit_tokens + at
                by_head = [int(unit) * epochs.unit_tokens + at for unit in self.choice[layer, :, slot]]
                turned = torch.cat(
                    [
                        self._turned(keys[position][head : head + 1], place - epochs.place_of(position))
                        for head, position in enumerate(by_head)
                    ]
                )
                seen.append((place, turned, torch.stack([values[at][head] for head, at in enumerate(by_head)])))
        for position in range(*epochs.carried(epoch)):
            turned = self._turned(keys[position], -epochs.epoch_tokens)
            seen.append((epochs.place_of(position) - epochs.epoch_tokens, turned, values[position]))
        own = range(epochs.start_of(epoch), end)
        return seen + [(epochs.place_of(position), keys[position], values[position]) for position in own]
