"""A whole step of few rows by one call of our kernel, for models whose structure it knows: Llama and kin, in bfloat16.

Between two layers of modules such a step waits for Python and for threads more than for memory. What the kernel
(native/fused_step.c) makes of a model is compared with the model's own modules when it is loaded; where it is not the
same up to rounding, the modules do the work.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeVar

import numpy as np
import structlog
import torch
from torch import nn
from transformers import LlamaForCausalLM, MistralForCausalLM, PreTrainedModel, Qwen2ForCausalLM, Qwen3ForCausalLM

from worker.attention.cpu import CpuAttention
from worker.attention.decode_kernel import DecodeKernel
from worker.attention.paged import AttentionStep, Hearer, Run, Span
from worker.attention.prompt_kernel import PromptKernel
from worker.model.linear_cpu import Linear, NativeLinear
from worker.model.load import LoadedModel
from worker.native.build import NativeUnavailable, load_native

_log = structlog.get_logger(__name__)

_MODELS: Final = (LlamaForCausalLM, MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM)
"""Exactly these: what is derived from them may compute something else."""
_WIDEST_HEAD: Final = 512
"""WIDEST_HEAD in the source."""
_MAX_ERROR: Final = 0.05
"""Of logits, keys and values, relative. Sums taken in another order make a hundredth, a wrong structure about 1."""
_TRIED_AT: Final = (0, 5, 40)
"""Positions of the sequences that are compared; the last has a chunk, where there is a kernel for prompts."""
_TRIED_CHUNK: Final = 9
_MOST_TOKENS: Final = 64
"""Of a chunk: longer ones are computed as fast by the modules."""


class _Layer(ctypes.Structure):
    """`Layer` in the source."""

    _fields_ = (
        ("attention_in", Linear * 3),
        *[(name, Linear) for name in ("attention_out", "gate", "up", "down")],
        *[(name, ctypes.c_void_p) for name in ("before_attention", "before_mlp", "query_norm", "key_norm")],
        *[(name, ctypes.c_void_p) for name in ("keys", "values")],
        *[(name, ctypes.c_float) for name in ("scaling", "epsilon", "query_epsilon", "key_epsilon")],
    )


class _Model(ctypes.Structure):
    """`Model` in the source."""

    _fields_ = (
        *(("layers", ctypes.c_void_p), ("head", Linear), ("last_norm", ctypes.c_void_p)),
        *[(name, ctypes.c_int64) for name in ("num_layers", "hidden", "intermediate", "heads", "kv_heads", "head_dim")],
        *(("kv_head_stride", ctypes.c_int64), ("last_epsilon", ctypes.c_float)),
    )


class _Batch(ctypes.Structure):
    """`Batch` in the source."""

    _fields_ = (
        *[(name, ctypes.c_void_p) for name in ("decoding", "prompts", "slots", "cos", "sin", "wanted")],
        *[(name, ctypes.c_void_p) for name in ("hidden", "normed", "parts", "attended", "gated", "logits", "queries")],
        *[(name, ctypes.c_int64) for name in ("rows", "num_wanted", "num_threads")],
    )


class _Plan(Protocol):
    step: Any


PlanT = TypeVar("PlanT", bound=_Plan)


class _Kernel(Protocol[PlanT]):
    def plan(self, spans: Sequence[Span], window: int | None) -> PlanT: ...

    def prepare(self, plan: PlanT, heads: int, keys: torch.Tensor) -> None: ...


@dataclass(frozen=True, slots=True)
class _Steps:
    """Each layer's step, as attention reads it."""

    pointers: ctypes.Array[ctypes.c_void_p]
    plans: object
    """What they point to."""


@dataclass(frozen=True, slots=True)
class Rows:
    """A step's tokens: of decoding sequences one each, of prompts short chunks."""

    ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    """Where each row's key and value go. All three are [rows], int64."""
    wanted: torch.Tensor
    """Rows that logits are for, int64."""
    spans: Sequence[Span]


class FusedStep:
    """Runs few rows through a model. A row's bits don't depend on the others. Used by one thread."""

    def __init__(
        self,
        loaded: LoadedModel,
        pool: torch.Tensor,
        library: ctypes.CDLL,
        kernel: DecodeKernel,
        prompt_kernel: PromptKernel | None,
    ) -> None:
        """`pool` is KVCache.data. Raises NativeUnavailable where the model is none that the kernel knows."""
        _refuse(loaded, pool, kernel)
        self._loaded, self._pool, self._kernel = loaded, pool, kernel
        self._prompt_kernel = prompt_kernel if prompt_kernel is not None and prompt_kernel.serves(pool) else None
        self._function = library.fused_step
        self._function.argtypes, self._function.restype = (ctypes.POINTER(_Model), ctypes.POINTER(_Batch)), None
        inner = loaded.model.model
        self._layers = (_Layer * len(inner.layers))(*map(_layer, inner.layers, pool))
        self._widths = _widths(loaded)
        self._model = _Model(
            *(ctypes.addressof(self._layers), loaded.model.lm_head.layer, inner.norm.weight.data_ptr()),
            *(len(inner.layers), self._widths[0], self._widths[3]),
            *(loaded.attends.num_heads, loaded.attends.kv_heads, loaded.attends.head_dim),
            *(pool.stride(2), inner.norm.variance_epsilon),
        )
        self._scratch: list[torch.Tensor] = []

    def takes(self, num_tokens: int) -> bool:
        """Whether a chunk of so many tokens is one for `run`."""
        return num_tokens == 1 or (self._prompt_kernel is not None and num_tokens <= _MOST_TOKENS)

    def run(self, rows: Rows, hearers: Sequence[tuple[Span, Hearer]] = ()) -> torch.Tensor:
        """Write the rows' KV. Returns logits [wanted, vocab], bfloat16. `hearers` hear the queries of their spans."""
        inner = self._loaded.model.model
        hidden = inner.embed_tokens(rows.ids)
        cos, sin = (part[0].contiguous() for part in inner.rotary_emb(hidden, position_ids=rows.positions[None]))
        ones = [span for span in rows.spans if span.num_queries == 1]
        chunks = [span for span in rows.spans if span.num_queries > 1]
        assert self._prompt_kernel is not None or not chunks, "these are none that it takes"
        decoding = self._steps(self._kernel, ones) if ones else None
        prompts = self._steps(self._prompt_kernel, chunks) if self._prompt_kernel is not None and chunks else None
        num_rows = len(rows.ids)
        if not self._scratch or len(self._scratch[0]) < num_rows:
            self._scratch = [hidden.new_empty(num_rows, width) for width in self._widths]
        logits = hidden.new_empty(len(rows.wanted), self._model.head.outputs)
        attends = self._loaded.attends
        queries = hidden.new_empty(len(self._layers), num_rows if hearers else 0, attends.num_heads, attends.head_dim)
        batch = _Batch(
            *(steps and ctypes.addressof(steps.pointers) for steps in (decoding, prompts)),
            *(part.data_ptr() for part in (rows.slots, cos, sin, rows.wanted, hidden, *self._scratch, logits)),
            *(queries.data_ptr() if hearers else None,),
            *(num_rows, len(rows.wanted), torch.get_num_threads()),
        )
        self._function(self._model, batch)
        for layer, of_layer in enumerate(queries if hearers else ()):
            for span, hear in hearers:
                hear(layer, of_layer[span.row : span.row + span.num_queries].transpose(0, 1))
        return logits

    def _steps(self, kernel: _Kernel[PlanT], spans: Sequence[Span]) -> _Steps:
        attends = self._loaded.attends
        plans = {window: kernel.plan(spans, window) for window in set(attends.windows)}
        for plan in plans.values():
            kernel.prepare(plan, attends.num_heads, self._pool[0, 0])
        addresses = (ctypes.addressof(plans[window].step) for window in attends.windows)
        return _Steps((ctypes.c_void_p * len(self._layers))(*addresses), plans)


def load_fused_step(
    loaded: LoadedModel, pool: torch.Tensor, kernel: DecodeKernel | None, prompt_kernel: PromptKernel | None
) -> FusedStep | None:
    """None where there is no kernel for this model to be had here; the log says why."""
    try:
        if kernel is None:
            raise NativeUnavailable("it needs the decode kernel")
        library = load_native()
        _check(loaded, library, kernel, prompt_kernel)
        return FusedStep(loaded, pool, library, kernel, prompt_kernel)
    except NativeUnavailable as error:
        _log.info("fused_step_unavailable", reason=str(error), instead="the model's modules")
        return None


def _refuse(loaded: LoadedModel, pool: torch.Tensor, kernel: DecodeKernel) -> None:
    model, attends = loaded.model, loaded.attends
    if type(model) not in _MODELS or model.config.hidden_act != "silu":
        raise NativeUnavailable(f"{type(model).__name__} with {model.config.hidden_act} is none that it knows")
    if pool.dtype != torch.bfloat16 or any(parameter.dtype != torch.bfloat16 for parameter in model.parameters()):
        raise NativeUnavailable("not all of the model is bfloat16")
    if not kernel.serves(pool) or attends.head_dim > _WIDEST_HEAD:
        raise NativeUnavailable(f"it can't serve heads of {attends.head_dim}")
    if others := [name for name, module in _linears(model).items() if type(module) is not NativeLinear]:
        raise NativeUnavailable(f"{others[0]} and {len(others) - 1} more are none of its linear layers")


def _linears(model: PreTrainedModel) -> dict[str, nn.Module]:
    known = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lm_head")
    return {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in known}


def _layer(module: Any, pool: torch.Tensor) -> _Layer:
    """`module` is one of the model's layers, `pool` that layer's KV."""
    attention, mlp = module.self_attn, module.mlp
    query_norm, key_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    return _Layer(
        (Linear * 3)(attention.q_proj.layer, attention.k_proj.layer, attention.v_proj.layer),
        *(attention.o_proj.layer, mlp.gate_proj.layer, mlp.up_proj.layer, mlp.down_proj.layer),
        *(module.input_layernorm.weight.data_ptr(), module.post_attention_layernorm.weight.data_ptr()),
        *(norm.weight.data_ptr() if norm is not None else None for norm in (query_norm, key_norm)),
        *(pool[0].data_ptr(), pool[1].data_ptr(), attention.scaling, module.input_layernorm.variance_epsilon),
        *(norm.variance_epsilon if norm is not None else 0.0 for norm in (query_norm, key_norm)),
    )


def _widths(loaded: LoadedModel) -> tuple[int, int, int, int]:
    """Of a row of the scratch: normed, parts, attended, gated."""
    attends, mlp = loaded.attends, loaded.model.model.layers[0].mlp
    heads = attends.num_heads + 2 * attends.kv_heads
    return (
        mlp.gate_proj.in_features,
        heads * attends.head_dim,
        attends.num_heads * attends.head_dim,
        mlp.gate_proj.out_features,
    )


def _check(loaded: LoadedModel, library: ctypes.CDLL, kernel: DecodeKernel, prompt_kernel: PromptKernel | None) -> None:
    """Run a few rows over random KV through the kernel and through the modules, and compare logits and KV."""
    attends, generator = loaded.attends, torch.Generator().manual_seed(0)
    room = max(_TRIED_AT) + _TRIED_CHUNK
    shape = (attends.num_layers, 2, attends.kv_heads, len(_TRIED_AT) * room, attends.head_dim)
    pool = torch.randn(shape, generator=generator).bfloat16()
    other = pool.clone()
    ours = FusedStep(loaded, pool, library, kernel, prompt_kernel)
    lengths = [1] * (len(_TRIED_AT) - 1) + [_TRIED_CHUNK if ours.takes(_TRIED_CHUNK) else 1]
    firsts = np.cumsum([0, *lengths])
    spans = [
        Span(int(row), length, at, (Run(0, number * room, at + length),))
        for number, (row, length, at) in enumerate(zip(firsts, lengths, _TRIED_AT, strict=False))
    ]
    positions = torch.cat([torch.arange(span.start, span.end) for span in spans])
    slots = torch.cat([torch.arange(span.start, span.end) + number * room for number, span in enumerate(spans)])
    numbers = torch.arange(len(positions))
    rows = Rows((numbers * 37 + 11) % loaded.vocab_size, positions, slots, numbers, spans)
    with torch.inference_mode():
        logits = ours.run(rows)
        step = AttentionStep(CpuAttention(other, kernel), other, spans, slots)
        theirs = loaded.model(input_ids=rows.ids[None], position_ids=positions[None], use_cache=False, step=step)
    for one, wanted in ((logits, theirs.logits[0]), (pool[:, :, :, slots], other[:, :, :, slots])):
        distance = float((one.float() - wanted.float()).norm() / wanted.float().norm())
        if not distance <= _MAX_ERROR:  # NaN fails too
            raise NativeUnavailable(f"it computes something else than the modules (relative error {distance:.2g})")
