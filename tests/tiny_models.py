"""Tiny random checkpoints of the architectures that are served, saved as transformers saves them."""

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 320
WINDOW = 24
"""Sliding window of the tiny models that have one: shorter than the contexts of the tests."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,  # with less, so small a model hardly hears its context
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}
_MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "decoder_sparse_step": 1}
_ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "qwen3_moe": ("Qwen3MoeConfig", {"head_dim": 16, **_MOE}),
    "mistral": ("MistralConfig", {"head_dim": 16, "sliding_window": WINDOW}),
    # Tied, its scaled embeddings make a random model repeat its last token for ever.
    "gemma2": (
        "Gemma2Config",
        {"head_dim": 16, "sliding_window": WINDOW, "query_pre_attn_scalar": 16, "tie_word_embeddings": False},
    ),
    "phi3": ("Phi3Config", {"sliding_window": None}),
    "olmo2": ("Olmo2Config", {}),
    "gpt_neox": ("GPTNeoXConfig", {"num_key_value_heads": 4}),
    "granite": ("GraniteConfig", {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0}),
}
ARCHITECTURES = tuple(_ARCHITECTURES)


def tiny_config(architecture: str, **changes: Any) -> Any:
    """The config of a tiny model of `architecture`, with settings changed."""
    class_name, own = _ARCHITECTURES[architecture]
    return getattr(transformers, class_name)(**{**_COMMON, **own, **changes})


def tiny_model(architecture: str, *, seed: int = 0, **changes: Any) -> PreTrainedModel:
    """A model with random weights, float32, in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return AutoModelForCausalLM.from_config(tiny_config(architecture, **changes), dtype=torch.float32).eval()


def save_tiny_model(directory: Path, architecture: str, *, seed: int = 0, **changes: Any) -> Path:
    """Write a checkpoint into `directory`, which may not exist yet, and return it."""
    tiny_model(architecture, seed=seed, **changes).save_pretrained(directory)
    return directory


def generate(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What transformers' own greedy `generate` replies to `prompt`, never ending before `num_tokens`."""
    output = model.generate(torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    reply: list[int] = output[0, len(prompt) :].tolist()
    return reply
