"""Models by shape, with random weights from a seed: for demonstrations, tests and measurements. Nothing to download."""

from typing import Any, Final

import torch
from transformers import PreTrainedConfig, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from worker.errors import ModelRefused
from worker.model.presets_tokenizer import BOS_TOKEN_ID, EOS_TOKEN_ID

PREFIX = "preset:"

SHAPES: Final[dict[str, dict[str, Any]]] = {
    "qwen3-0.6b": {
        "num_hidden_layers": 28,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 32_000,
        "max_position_embeddings": 40_960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1_000_000.0},
        "dtype": "bfloat16",
    },
    "tiny": {
        "num_hidden_layers": 4,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 4096,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "initializer_range": 0.2,  # with less, so small a model hardly hears its context
        "dtype": "float32",
    },
}


def preset_config(name: str) -> PreTrainedConfig:
    """The shape called `name`. Raises ModelRefused for a name there is none of."""
    if name not in SHAPES:
        raise ModelRefused(f"there is no preset {name!r}; there are {', '.join(SHAPES)}")
    return Qwen3Config(**SHAPES[name], tie_word_embeddings=True, bos_token_id=BOS_TOKEN_ID, eos_token_id=EOS_TOKEN_ID)


def random_model(config: PreTrainedConfig, dtype: torch.dtype, seed: int) -> PreTrainedModel:
    """Equal seeds, equal weights (of one torch version). On the CPU; attention is transformers' own, "eager"."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return Qwen3ForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager")
