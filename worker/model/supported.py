"""Whether this engine serves a model exactly: what its config says, then what its attention does when it is run.

A model that passes attends as the block pool does: each layer once, over all earlier tokens of its own sequence (or a
window of them), with keys and values of one shape that depend on nothing that comes later.
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from worker.attention.paged import ATTENTION_NAME, exact_attention
from worker.errors import ModelRefused

_PROBE_TOKENS = 8
_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
_FIXED_ROPE = frozenset({"default", "linear", "yarn", "llama3", "proportional"})
_MAX_ERROR = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.25}
"""Of the logits, relative. Rounding alone makes a few hundredths in 16 bits; wrong attention makes about 1."""


class LayerShape(NamedTuple):
    kv_heads: int
    head_dim: int
    value_dim: int


@dataclass(frozen=True, slots=True)
class Attends:
    """What a model's attention was seen to do."""

    num_layers: int
    num_heads: int
    kv_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    """Of each layer; None sees all earlier tokens."""
    capped: bool
    """Whether scores are capped (`softcap`)."""


def refuse_by_config(config: PreTrainedConfig) -> None:
    """Raises ModelRefused for what the config says that this engine can't serve exactly."""
    text = config.get_text_config()
    name = config.model_type
    if config.is_encoder_decoder:
        raise ModelRefused(f"{name} is an encoder-decoder model; only decoder-only models are served")
    if getattr(text, "add_cross_attention", False) or getattr(text, "cross_attention_layers", None):
        raise ModelRefused(f"{name} has cross attention")
    if others := set(getattr(text, "layer_types", None) or ()) - _LAYER_TYPES:
        raise ModelRefused(f"{name} has layers other than full and sliding attention: {', '.join(sorted(others))}")
    if getattr(text, "num_kv_shared_layers", 0):
        raise ModelRefused(f"{name} shares keys and values across layers")
    if getattr(text, "alibi", False):
        raise ModelRefused(f"{name} biases its attention by position (ALiBi)")
    if not isinstance(getattr(text, "max_position_embeddings", None), int):
        raise ModelRefused(f"{name} says no max_position_embeddings, so its window is unknown")
    for parameters in _ropes(text):
        _refuse_rope(name, parameters, text.max_position_embeddings)


def _ropes(config: PreTrainedConfig) -> list[Mapping[str, Any]]:
    """RoPE parameters, which may be given for each type of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, Mapping)]
    return nested or [parameters]


def _refuse_rope(name: str, parameters: Mapping[str, Any], max_positions: int) -> None:
    kind = parameters.get("rope_type", "default")
    if kind == "longrope":
        # Its factors change for all positions once a sequence is longer than this: KV would depend on what comes later.
        if max_positions > parameters.get("original_max_position_embeddings", 0):
            raise ModelRefused(f"{name} has longrope positions, which change as a sequence grows")
    elif kind not in _FIXED_ROPE:
        raise ModelRefused(
            f"{name} has {kind} RoPE, whose positions are not known to stay the same as a sequence grows"
        )


def probe(model: PreTrainedModel) -> Attends:
    """Run two short sequences in one row through our attention, and each alone through the model's own.

    Leaves the model with our attention. Raises ModelRefused if that is not called once a layer, is asked for what it
    doesn't honour, or comes to other logits.
    """
    name = model.config.model_type
    vocab = model.get_input_embeddings().weight.shape[0]
    tokens = (torch.arange(2 * _PROBE_TOKENS, device=model.device) * 37 + 11) % vocab
    halves = tokens.view(2, 1, _PROBE_TOKENS)
    try:
        with torch.inference_mode():
            wanted = torch.cat([model(input_ids=half, use_cache=False).logits[0] for half in halves])
            model.set_attn_implementation(ATTENTION_NAME)
            probing = _Probe()
            positions = torch.arange(_PROBE_TOKENS, device=model.device).repeat(2)
            row = model(input_ids=tokens[None], position_ids=positions[None], use_cache=False, step=probing).logits[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        raise ModelRefused(f"{name} does not run with this engine's attention: {error}") from error
    attends = probing.seen(name, model.config.get_text_config())
    distance = float((row.float() - wanted.float()).norm() / wanted.float().norm())
    if not distance <= _MAX_ERROR[row.dtype]:  # NaN fails too
        raise ModelRefused(f"{name} computes other logits with this engine's attention (relative error {distance:.2g})")
    return attends


class _Probe:
    """Attention over a row of two sequences, noting what it is asked."""

    def __init__(self) -> None:
        self._calls: Counter[int] = Counter()
        self._shapes: dict[int, LayerShape] = {}
        self._windows: dict[int, int | None] = {}
        self._capped = False
        self._num_heads = 0

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
        self._calls[layer] += 1
        self._shapes[layer] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        self._windows[layer] = window
        self._capped |= softcap is not None
        self._num_heads = query.shape[1]
        positions = torch.arange(_PROBE_TOKENS, device=query.device)
        halves = [
            exact_attention(
                query[0, :, rows : rows + _PROBE_TOKENS],
                key[0, :, rows : rows + _PROBE_TOKENS],
                value[0, :, rows : rows + _PROBE_TOKENS],
                start=0,
                key_positions=positions,
                scaling=scaling,
                window=window,
                softcap=softcap,
            )
            for rows in (0, _PROBE_TOKENS)
        ]
        return torch.cat(halves)[None]

    def seen(self, name: str, config: PreTrainedConfig) -> Attends:
        num_layers: int = config.num_hidden_layers
        if self._calls != Counter(range(num_layers)):
            raise ModelRefused(
                f"{name} has {num_layers} layers but calls the attention interface in {len(self._calls)} of them, "
                f"{self._calls.total()} times"
            )
        if len(shapes := set(self._shapes.values())) != 1:
            raise ModelRefused(f"{name} has layers with keys and values of different shapes: {sorted(shapes)}")
        shape = shapes.pop()
        if shape.head_dim != shape.value_dim:
            raise ModelRefused(f"{name} has keys of {shape.head_dim} numbers a head and values of {shape.value_dim}")
        windows = tuple(self._windows[layer] for layer in range(num_layers))
        for layer, kind in enumerate(getattr(config, "layer_types", None) or ()):
            if (kind == "sliding_attention") != (windows[layer] is not None):
                raise ModelRefused(f"{name} says that layer {layer} has {kind}, but asks for window {windows[layer]}")
        return Attends(num_layers, self._num_heads, shape.kv_heads, shape.head_dim, windows, self._capped)
