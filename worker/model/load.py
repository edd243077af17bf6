"""Load a model to be served: find it, refuse what can't be served exactly, name what its KV is good for."""

from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from cache_store.layout import KVLayout, choose_block_tokens
from worker.attention.paged import register_attention
from worker.config import WorkerConfig
from worker.errors import ModelRefused
from worker.model import presets
from worker.model.fingerprint import checkpoint_content, fingerprint, tensors_content
from worker.model.linear_cpu import pack_linears
from worker.model.shipped import locate
from worker.model.supported import Attends, probe, refuse_by_config
from worker.tiers.codecs.rope import Rope
from worker.tiers.codecs.rope_of import rope_of

_DEFAULT_CPU_CACHE_BYTES = 1 << 30
_CUDA_CACHE_SHARE = 0.9
_NEEDED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken"]


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """A model in evaluation mode on its device, with this engine's attention, and what others must know of it."""

    model: PreTrainedModel
    device: torch.device
    layout: KVLayout
    attends: Attends
    rope: Rope | None
    """How keys are turned by their position, where that is known."""
    max_context_tokens: int
    """Prompt and reply together."""
    vocab_size: int
    """Logits per token."""
    eos_token_ids: frozenset[int]
    fingerprint: bytes
    names_from: bytes
    """What the names of its blocks begin with: the fingerprint, or what a keyring makes of it."""
    weight_bytes: int
    marks_from: bytes = b""
    """What tenants' marks in those names are made with: a keyring's secret, or nothing."""

    def num_device_blocks(self, cache_bytes: int) -> int:
        """How many blocks `cache_bytes` hold, one at the least; 0 bytes: as much as the device has to spare."""
        if cache_bytes == 0 and self.device.type == "cuda":
            cache_bytes = int(_CUDA_CACHE_SHARE * torch.cuda.mem_get_info(self.device)[0])
        return max(1, (cache_bytes or _DEFAULT_CPU_CACHE_BYTES) // self.layout.block_bytes)


def load_model(config: WorkerConfig) -> LoadedModel:
    """Load what `config.model` names, ready to run. Raises ModelRefused with the reason.

    Sets torch's number of threads where `config.cpu_threads` says one.
    """
    if config.cpu_threads:
        torch.set_num_threads(config.cpu_threads)
    device = choose_device(config.device)
    register_attention()
    model, content = _preset(config) if config.model.startswith(presets.PREFIX) else _checkpoint(config)
    model = model.to(device).eval().requires_grad_(False)
    attends = probe(model)
    rope = rope_of(model)
    layout = _layout(attends, model.dtype, config.block_tokens)
    weight_bytes = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    if device.type == "cpu":
        pack_linears(model)
    named = fingerprint(content, model.config.to_dict(), layout)
    return LoadedModel(
        model=model,
        device=device,
        layout=layout,
        attends=attends,
        rope=rope,
        max_context_tokens=model.config.get_text_config().max_position_embeddings,
        vocab_size=model.config.get_text_config().vocab_size,
        eos_token_ids=_eos_token_ids(model),
        fingerprint=named,
        names_from=named,
        weight_bytes=weight_bytes,
    )


def choose_device(wanted: str) -> torch.device:
    """What cpu, cuda or auto means here. Raises ModelRefused."""
    if wanted == "cuda" and not torch.cuda.is_available():
        raise ModelRefused("device is cuda, but torch sees no CUDA device")
    return torch.device(("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted)


def _preset(config: WorkerConfig) -> tuple[PreTrainedModel, dict[str, str]]:
    shape = presets.preset_config(config.model.removeprefix(presets.PREFIX))
    dtype = shape.dtype if config.dtype == "auto" else getattr(torch, config.dtype)
    model = presets.random_model(shape, dtype, config.preset_seed)
    return model, tensors_content(model.state_dict())


def _checkpoint(config: WorkerConfig) -> tuple[PreTrainedModel, dict[str, str]]:
    directory = find_checkpoint(locate(config.model))
    if (directory / "adapter_config.json").exists():
        raise ModelRefused(f"{config.model} is an adapter, not a model")
    show = (
        transformers_logging.enable_progress_bar if config.show_progress else transformers_logging.disable_progress_bar
    )
    show()
    dtype = "auto" if config.dtype == "auto" else getattr(torch, config.dtype)
    try:
        refuse_by_config(AutoConfig.from_pretrained(directory))
        model, loading = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype, attn_implementation="eager", output_loading_info=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelRefused(f"transformers can't load {config.model}: {error}") from error
    if missing := sorted(loading["missing_keys"]):
        raise ModelRefused(f"{config.model} lacks weights: {', '.join(missing[:5])} ({len(missing)} in all)")
    return model, checkpoint_content(directory)


def find_checkpoint(model: str) -> Path:
    """The directory of a checkpoint; a hub id is downloaded, or found where it was downloaded before."""
    if Path(model).is_dir():
        return Path(model)
    try:
        return Path(snapshot_download(model, allow_patterns=_NEEDED_FILES))
    except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise ModelRefused(f"{model} is no directory, and can't be had from the hub: {error}") from error


def _layout(attends: Attends, dtype: torch.dtype, block_tokens: int) -> KVLayout:
    shape = {"num_layers": attends.num_layers, "num_kv_heads": attends.kv_heads, "head_dim": attends.head_dim}
    name = str(dtype).removeprefix("torch.")
    one = KVLayout(**shape, block_tokens=1, dtype=name)
    return KVLayout(**shape, block_tokens=block_tokens or choose_block_tokens(one.token_bytes), dtype=name)


def _eos_token_ids(model: PreTrainedModel) -> frozenset[int]:
    given = model.generation_config.eos_token_id if model.can_generate() else model.config.eos_token_id
    return frozenset([given] if isinstance(given, int) else given or ())
