"""Models by shape with random weights made where they run: nothing is downloaded, and 8B parameters take seconds."""

from typing import Any, Final

import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from cache_store.layout import KVLayout, choose_block_tokens
from worker.attention.paged import register_attention
from worker.model.load import LoadedModel
from worker.model.presets import SHAPES as PRESETS
from worker.model.supported import probe

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "qwen3-0.6b": PRESETS["qwen3-0.6b"] | {"vocab_size": 151_936, "tie_word_embeddings": True},
    "qwen3-8b": {
        "num_hidden_layers": 36,
        "hidden_size": 4096,
        "intermediate_size": 12_288,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151_936,
        "tie_word_embeddings": False,
        "dtype": "bfloat16",
    },
    "tiny": {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "tie_word_embeddings": True,
        "dtype": "float32",
    },
}
_MAX_TOKENS = 40_960


def bare_model(shape: str, device: torch.device) -> PreTrainedModel:
    """As transformers serves it, with the attention that it would choose."""
    config = Qwen3Config(**SHAPES[shape] | {"max_position_embeddings": _MAX_TOKENS})
    with torch.device(device):
        model = Qwen3ForCausalLM._from_config(config, dtype=config.dtype, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def loaded_model(shape: str, device: torch.device) -> LoadedModel:
    """As our runner takes it. Its KV is of nobody else's use, so it has no fingerprint."""
    register_attention()
    model = bare_model(shape, device)
    attends = probe(model)
    kv = {"num_layers": attends.num_layers, "num_kv_heads": attends.kv_heads, "head_dim": attends.head_dim}
    dtype = str(model.dtype).removeprefix("torch.")
    token_bytes = KVLayout(**kv, block_tokens=1, dtype=dtype).token_bytes
    return LoadedModel(
        model=model,
        device=device,
        layout=KVLayout(**kv, block_tokens=choose_block_tokens(token_bytes), dtype=dtype),
        attends=attends,
        rope=None,
        max_context_tokens=_MAX_TOKENS,
        vocab_size=model.config.vocab_size,
        eos_token_ids=frozenset(),
        fingerprint=b"",
        names_from=b"",
        weight_bytes=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
    )
