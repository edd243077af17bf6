"""Find out how a model turns its keys by their position: what its config promises is not believed, but tried.

Of a sequence of one token over and over, every position has the same hidden state in every layer, since attention can
but average equal values. So whatever differs between two keys of a layer is their position's doing.
"""

from typing import Final

import torch
from transformers import PreTrainedModel

from worker.tiers.codecs.rope import Rope

_POSITIONS: Final = (0, 1, 2, 5, 60, 400)
_MAX_ERROR: Final = {torch.float32: 1e-3, torch.bfloat16: 0.03, torch.float16: 0.01}
"""Of the keys, relative. Rounding makes a third of it at most; another rotation makes about 1."""


def rope_of(model: PreTrainedModel) -> Rope | None:
    """The rotation that a model (with this engine's attention) gives to its keys, the same in all layers.

    None where it is not one of llama's kind (half against half, one angle per pair and position).
    """
    frequencies = {tuple(buffer.tolist()) for name, buffer in model.named_buffers() if name.endswith("inv_freq")}
    if len(frequencies) != 1:
        return None
    rope = Rope(torch.tensor(frequencies.pop(), dtype=torch.float64).numpy())
    limit = model.config.get_text_config().max_position_embeddings
    positions = [position for position in _POSITIONS if position < limit]
    keys = torch.stack(_keys_at(model, positions))
    if 2 * rope.num_pairs > keys.shape[-1]:
        return None
    unturned = keys.float().cpu()
    for index, position in enumerate(positions):
        rope.turn(position, 1, unturned.device).undo(unturned[:, :, index : index + 1])
    drift = (unturned - unturned[:, :, :1]).flatten(1).norm(dim=1)
    distance = float((drift / unturned.flatten(1).norm(dim=1)).max())
    return rope if distance <= _MAX_ERROR[keys.dtype] else None  # nor if it is NaN


def _keys_at(model: PreTrainedModel, positions: list[int]) -> list[torch.Tensor]:
    """The keys [kv_heads, positions, head_dim] of each layer of one token at these positions."""
    step = _KeyStep()
    ids = torch.full((1, len(positions)), model.config.get_text_config().vocab_size // 2, device=model.device)
    with torch.inference_mode():
        model(input_ids=ids, position_ids=torch.tensor([positions], device=model.device), use_cache=False, step=step)
    return [step.keys[layer] for layer in range(len(step.keys))]


class _KeyStep:
    """Attention among equal tokens, noting the keys: whatever the weights, their values' average is the value."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}

    def attend(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        layer: int = module.layer_idx
        self.keys[layer] = key[0]
        return value.repeat_interleave(query.shape[1] // value.shape[1], 1).transpose(1, 2)
