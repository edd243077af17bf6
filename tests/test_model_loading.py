"""A model is served exactly or refused by name; its fingerprint changes with all that its KV depends on."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from cache_store.layout import choose_block_tokens
from tests.tiny_models import save_tiny_model, tiny_model
from worker.config import WorkerConfig
from worker.errors import ModelRefused
from worker.model.fingerprint import checkpoint_content
from worker.model.load import LoadedModel, load_model


def load(model: Path | str, **settings: Any) -> LoadedModel:
    return load_model(WorkerConfig(model=str(model), device="cpu", **settings))


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny_model(tmp_path / "llama", "llama")


def save(directory: Path, class_name: str, **settings: Any) -> Path:
    """A tiny checkpoint of any architecture."""
    config = getattr(transformers, class_name)(**settings)
    with torch.random.fork_rng(devices=[]):
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(directory)
    return directory


def test_a_checkpoint_says_what_others_must_know_of_it(llama: Path) -> None:
    loaded = load(llama)
    assert loaded.layout.block_shape == (3, 2, 2, 256, 12)
    assert loaded.layout.dtype == "float32"
    assert (loaded.max_context_tokens, loaded.vocab_size) == (512, 320)
    assert loaded.eos_token_ids == {1}
    assert loaded.weight_bytes >= sum(parameter.nbytes for parameter in tiny_model("llama").parameters())
    assert not loaded.model.training
    assert loaded.num_device_blocks(10 * loaded.layout.block_bytes + 5) == 10
    assert loaded.num_device_blocks(0) == (1 << 30) // loaded.layout.block_bytes


def test_the_dtype_and_block_size_asked_for_are_taken(llama: Path) -> None:
    layout = load(llama, dtype="bfloat16", block_tokens=32).layout
    assert (layout.dtype, layout.block_tokens) == ("bfloat16", 32)


def test_several_end_tokens_of_the_generation_config_all_count(llama: Path) -> None:
    path = llama / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "eos_token_id": [1, 7]}))
    assert load(llama).eos_token_ids == {1, 7}


def test_presets_are_made_from_their_seed() -> None:
    first, again, other = load("preset:tiny"), load("preset:tiny"), load("preset:tiny", preset_seed=1)
    assert first.layout.block_tokens == choose_block_tokens(first.layout.token_bytes)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert first.max_context_tokens >= 2048


def test_loading_leaves_the_random_numbers_of_others_alone() -> None:
    torch.manual_seed(5)
    wanted = torch.rand(3)
    torch.manual_seed(5)
    load("preset:tiny")
    assert torch.equal(torch.rand(3), wanted)


SMALL = {"hidden_size": 32, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 64}


@pytest.mark.parametrize(
    ("class_name", "settings", "reason"),
    [
        ("BloomConfig", {"hidden_size": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64}, "max_position_embeddings"),
        ("MambaConfig", {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}, "linear_attention"),
        ("FalconConfig", {**SMALL, "alibi": True}, "ALiBi"),
        ("GPTJConfig", {"n_embd": 32, "n_head": 4, "n_layer": 2, "vocab_size": 64, "rotary_dim": 4}, "gptj"),
        ("LlamaConfig", {**SMALL, "rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "dynamic RoPE"),
        (
            "GptOssConfig",
            {**SMALL, "head_dim": 8, "num_key_value_heads": 2, "intermediate_size": 32, "num_local_experts": 2}
            | {"num_experts_per_tok": 1},
            "s_aux",
        ),
        (
            "DeepseekV3Config",
            {
                **SMALL,
                "num_key_value_heads": 4,
                "intermediate_size": 32,
                "first_k_dense_replace": 2,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
            }
            | {"qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
            "keys of 16 numbers a head and values of 8",
        ),
        ("Lfm2Config", {**SMALL, "num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]}, "conv"),
        (
            "Qwen3NextConfig",
            {**SMALL, "num_key_value_heads": 2, "layer_types": ["linear_attention", "full_attention"]}
            | {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "head_dim": 8},
            "linear_attention",
        ),
        ("BertConfig", {**SMALL, "intermediate_size": 32, "is_decoder": True, "add_cross_attention": True}, "cross"),
    ],
)
def test_what_cannot_be_served_exactly_is_refused_with_the_reason(
    tmp_path: Path, class_name: str, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(ModelRefused, match=reason):
        load(save(tmp_path / "model", class_name, **settings))


def longrope(window: int) -> dict[str, Any]:
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 64, **factors}
    return {
        **SMALL,
        "num_key_value_heads": 2,
        "pad_token_id": None,
        "intermediate_size": 32,
        "rope_parameters": rope,
    } | {
        "max_position_embeddings": window,
        "original_max_position_embeddings": 64,
    }


def test_longrope_is_served_within_its_original_window_and_refused_beyond(tmp_path: Path) -> None:
    assert load(save(tmp_path / "short", "Phi3Config", **longrope(64))).max_context_tokens == 64
    with pytest.raises(ModelRefused, match="longrope"):
        load(save(tmp_path / "long", "Phi3Config", **longrope(128)))


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    transformers.T5Config(d_model=16, vocab_size=32).save_pretrained(tmp_path)
    with pytest.raises(ModelRefused, match="encoder-decoder"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("model", "reason"),
    [("preset:huge", "no preset 'huge'; there are"), ("/nowhere/at/all", "/nowhere/at/all is no directory")],
)
def test_a_model_that_is_not_there_is_refused(model: str, reason: str) -> None:
    with pytest.raises(ModelRefused, match=reason):
        load(model)


def test_a_directory_without_weights_or_with_an_adapter_is_refused(llama: Path) -> None:
    (llama / "adapter_config.json").write_text("{}")
    with pytest.raises(ModelRefused, match="adapter"):
        load(llama)
    (llama / "adapter_config.json").unlink()
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelRefused, match=r"model\.safetensors"):
        load(llama)


def test_a_checkpoint_that_lacks_weights_is_not_filled_up_with_random_ones(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4}))
    with pytest.raises(ModelRefused, match=r"lacks weights: .*layers\.3\."):
        load(llama)


def test_cuda_without_a_device_is_refused(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ModelRefused, match="no CUDA device"):
        load_model(WorkerConfig(model=str(llama), device="cuda"))


def test_equal_checkpoints_have_equal_fingerprints_wherever_they_lie(llama: Path, tmp_path: Path) -> None:
    shutil.copytree(llama, tmp_path / "elsewhere")
    assert load(llama).fingerprint == load(tmp_path / "elsewhere").fingerprint


def test_the_fingerprint_changes_with_everything_that_kv_depends_on(llama: Path, tmp_path: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    seen = {
        load(llama).fingerprint,
        load(llama, dtype="bfloat16").fingerprint,
        load(llama, block_tokens=16).fingerprint,
    }
    seen.add(load(save_tiny_model(tmp_path / "other-weights", "llama", seed=1)).fingerprint)
    (llama / "tokenizer.json").write_text('{"version": "1.0"}')
    seen.add(load(llama).fingerprint)
    (llama / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-4}))
    seen.add(load(llama).fingerprint)
    rope = {"rope_type": "default", "rope_theta": 5e5}
    (llama / "config.json").write_text(json.dumps({**config, "rope_parameters": rope}))
    seen.add(load(llama).fingerprint)
    assert len(seen) == 7


def test_digests_of_weights_are_kept_beside_them_and_renewed_with_the_file(llama: Path) -> None:
    weights = llama / "model.safetensors"
    first = checkpoint_content(llama)
    (cache,) = llama.glob(".rekindle-digests.json")
    ((key, digest),) = json.loads(cache.read_text()).items()
    assert first["model.safetensors"] == digest
    cache.write_text(json.dumps({key: "from the cache"}))
    assert checkpoint_content(llama)["model.safetensors"] == "from the cache"
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert checkpoint_content(llama) == first


def test_a_directory_that_cannot_be_written_is_read_at_each_start(llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = checkpoint_content(llama)
    (llama / ".rekindle-digests.json").unlink()

    def refuse(self: Path, text: str) -> int:
        raise PermissionError(str(self))

    monkeypatch.setattr(Path, "write_text", refuse)  # root, as tests often are, could write anywhere
    assert checkpoint_content(llama) == wanted
    assert not list(llama.glob(".rekindle*"))
