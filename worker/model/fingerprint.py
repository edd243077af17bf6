"""Digest of all that makes KV interchangeable. What it can't read, it doesn't vouch for: it fails closed.

Knows files, tensors and settings, and nothing of serving.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from cache_store.layout import KVLayout
from worker.errors import ModelRefused

LAYOUT_VERSION = 1
"""Raised when the meaning of a block's bytes changes."""

_DIGEST_BYTES = 32
_CACHE_NAME = ".rekindle-digests.json"
_SAFE_WEIGHTS = "*.safetensors"
_OTHER_WEIGHTS = "*.bin"
_SMALL_FILES = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_UNIMPORTANT = frozenset(
    {"_name_or_path", "transformers_version", "_attn_implementation", "_attn_implementation_internal"}
)


def fingerprint(content: Mapping[str, str], config: Mapping[str, Any], layout: KVLayout) -> bytes:
    """32 bytes: equal for two workers if, and only if, the one can use the other's blocks.

    `content` names digests of weights and tokenizer (`checkpoint_content`, `tensors_content`). `config` is the model's
    own as loaded, RoPE parameters and all.
    """
    settings = {key: value for key, value in config.items() if key not in _UNIMPORTANT}
    everything = {
        "layout_version": LAYOUT_VERSION,
        "layout": asdict(layout),
        "config": settings,
        "content": dict(content),
    }
    text = json.dumps(everything, sort_keys=True, default=str)
    return hashlib.blake2b(text.encode(), digest_size=_DIGEST_BYTES, person=b"rekindle-model").digest()


def checkpoint_content(directory: Path) -> dict[str, str]:
    """Digest, by name, of every file of a checkpoint that can change what its tokens or its KV are.

    Digests of weights are kept beside them, and hold while name, size and time of change do. Raises ModelRefused for a
    directory without weights.
    """
    weights = sorted(directory.glob(_SAFE_WEIGHTS)) or sorted(directory.glob(_OTHER_WEIGHTS))
    if not weights:
        raise ModelRefused(f"{directory} holds no weights ({_SAFE_WEIGHTS} or {_OTHER_WEIGHTS})")
    small = sorted(path for pattern in _SMALL_FILES for path in directory.glob(pattern) if path.name != _CACHE_NAME)
    known = _read_cache(directory)
    keys = {path: _cache_key(path) for path in weights}
    unknown = [path for path in weights if keys[path] not in known]
    with ThreadPoolExecutor() as threads:  # hashing lets go of the GIL
        new = dict(zip((keys[path] for path in unknown), threads.map(_file_digest, unknown), strict=True))
    if new:
        _write_cache(directory, {keys[path]: (known | new)[keys[path]] for path in weights})
    digests = {path.name: (known | new)[keys[path]] for path in weights}
    return digests | {path.name: _file_digest(path) for path in small}


def tensors_content(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Digest, by name, of tensors that come from no file."""

    def digest(tensor: torch.Tensor) -> str:
        plain = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
        return hashlib.blake2b(plain, digest_size=_DIGEST_BYTES).hexdigest()

    with ThreadPoolExecutor() as threads:
        return dict(zip(tensors, threads.map(digest, tensors.values()), strict=True))


def _file_digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=_DIGEST_BYTES)).hexdigest()


def _cache_key(path: Path) -> str:
    status = path.stat()  # of what a link leads to
    return f"{path.name}:{status.st_size}:{status.st_mtime_ns}"


def _read_cache(directory: Path) -> dict[str, str]:
    try:
        cached = json.loads((directory / _CACHE_NAME).read_text())
    except (OSError, ValueError):  # none yet, or not ours: the files are read again
        return {}
    return cached if isinstance(cached, dict) else {}


def _write_cache(directory: Path, digests: Mapping[str, str]) -> None:
    temporary = directory / f"{_CACHE_NAME}.{os.getpid()}"
    with suppress(OSError):  # a directory that may not be written costs a reading at each start
        temporary.write_text(json.dumps(digests))
        temporary.replace(directory / _CACHE_NAME)
