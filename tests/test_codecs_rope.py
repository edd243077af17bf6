"""Which rotation a model gives its keys is found by trying it, and taking it back makes keys easier to code."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from cache_store.codecs import INT4
from tests.codec_blocks import CPU, decode, encode, filled_cache, layout_of, llama_rope, load_tiny
from tests.tiny_models import ARCHITECTURES, tiny_config
from worker.attention.paged import register_attention
from worker.ids import BlockId
from worker.model.supported import probe
from worker.tiers.codecs.quantized import QuantizedCodec
from worker.tiers.codecs.rope import Rope
from worker.tiers.codecs.rope_of import rope_of

_ORIGINAL = {"rope_theta": 10_000.0, "original_max_position_embeddings": 128}
SCALED: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 4.0, "rope_theta": 10_000.0},
    {"rope_type": "yarn", "factor": 4.0, **_ORIGINAL},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
]


def probed(config: Any, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    register_attention()
    model = model.to(dtype).eval().requires_grad_(False)
    probe(model)
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_rotation_of_every_architecture_is_known(architecture: str, dtype: torch.dtype) -> None:
    rope = rope_of(probed(tiny_config(architecture), dtype))
    assert rope is not None
    if architecture == "gpt_neox":
        assert rope.num_pairs == 2, "a quarter of 12 numbers is rotated, rounded up to whole pairs"
    else:
        assert rope.num_pairs in (6, 8), "all of 12 or 16 numbers"


@pytest.mark.parametrize("parameters", SCALED, ids=lambda parameters: str(parameters["rope_type"]))
def test_scaled_rotations_are_known_too(parameters: dict[str, Any]) -> None:
    scaled, plain = rope_of(probed(tiny_config("llama", rope_parameters=parameters))), llama_rope(12)
    assert scaled is not None
    assert not torch.equal(scaled.turn(3, 1, CPU).cos, plain.turn(3, 1, CPU).cos)


@pytest.mark.parametrize("name", ["CohereConfig", "GlmConfig"])
def test_rotations_of_neighbouring_numbers_are_left_alone(name: str) -> None:
    settings = tiny_config("llama").to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    config = getattr(transformers, name)(
        **{key: settings[key] for key in kept}, num_key_value_heads=2, head_dim=12, pad_token_id=0
    )
    assert rope_of(probed(config)) is None


def test_a_model_whose_layers_do_not_all_turn_their_keys_is_left_alone() -> None:
    model = probed(tiny_config("llama"))
    assert rope_of(model) is not None
    skipped = model.model.layers[1].self_attn
    forward = skipped.forward

    def without_positions(*args: Any, position_embeddings: tuple[torch.Tensor, torch.Tensor], **others: Any) -> Any:
        cos, sin = position_embeddings
        return forward(*args, position_embeddings=(torch.ones_like(cos), torch.zeros_like(sin)), **others)

    skipped.forward = without_positions
    assert rope_of(model) is None


def test_keys_come_back_from_position_zero() -> None:
    keys = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    turn = llama_rope(64).turn(1000, 16, CPU)
    there_and_back = keys.clone()
    turn.undo(there_and_back)
    assert (there_and_back - keys).abs().max() > 1
    turn.apply(there_and_back)
    torch.testing.assert_close(there_and_back, keys, rtol=0, atol=2e-6)


def test_numbers_past_the_rotated_ones_are_left_alone() -> None:
    keys = torch.randn(2, 16, 64, generator=torch.Generator().manual_seed(0))
    turned = keys.clone()
    llama_rope(24).turn(5, 16, CPU).apply(turned)
    assert torch.equal(turned[..., 24:], keys[..., 24:])
    assert not torch.equal(turned[..., :24], keys[..., :24])


def error_of_keys(rope: Rope | None, kv: torch.Tensor, first_position: int) -> float:
    layers, _, heads, tokens, dim = kv.shape
    codec = QuantizedCodec(INT4, layout_of(layers, heads, dim, tokens, "float32"), rope, CPU)
    back = decode(codec, encode(codec, kv, first_position=first_position), kv, first_position=first_position)
    return float((back - kv)[:, 0].norm() / kv[:, 0].norm())


def test_a_models_keys_are_coded_better_without_their_rotation(tmp_path: Path) -> None:
    """Of a model whose keys have a bias, as Qwen2's do: a channel is off zero everywhere only before RoPE."""
    loaded = load_tiny(tmp_path, "qwen2", block_tokens=64)
    for name, parameter in loaded.model.named_parameters():
        if name.endswith("k_proj.bias"):
            parameter.copy_(4 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    kv = filled_cache(loaded, 4).view(BlockId(3))
    assert loaded.rope is not None
    assert error_of_keys(loaded.rope, kv, 192) < 0.75 * error_of_keys(None, kv, 192)
