"""A sentence-embedding model: texts as passages of tokens, and passages as vectors of unit length.

Vectors are made on one thread, which keeps to itself: on a CPU it wakes none of those that compute the served model's
steps.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModel, AutoModelForTextEncoding, AutoTokenizer
from transformers.utils import logging as transformers_logging

from worker.chunks import Passage, Span, cut
from worker.errors import ModelRefused
from worker.model.embedder_files import EmbedderFiles
from worker.tiers.codecs.codec import beside_the_model

_CPU_BATCH_TOKENS: Final = 512
"""Padded. A core is as fast with one passage as with many: batches are small, so that nobody waits long for a turn."""
_CUDA_BATCH_TOKENS: Final = 32_768

_ACTIVATIONS: Final = {"Identity": torch.nn.Identity, "Tanh": torch.nn.Tanh}
_POOLED: Final = "sentence_embedding"
"""What a linear layer takes, in the words of its file."""


class Embedder:
    """A model in memory. Its vectors are float32, whatever the weights were stored in."""

    def __init__(self, files: EmbedderFiles, device: torch.device) -> None:
        """Load it. Raises ModelRefused."""
        self._files = files
        self._device = device
        transformers_logging.disable_progress_bar()
        try:
            with beside_the_model(device):
                tokenizer = AutoTokenizer.from_pretrained(files.transformer)
                self._model = _load_transformer(files).to(device).eval().requires_grad_(False)
                self._dense = [_load_dense(folder).to(device) for folder in files.dense]
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise ModelRefused(f"embedder: transformers can't load {files.transformer}: {error}") from error
        if not tokenizer.is_fast:
            raise ModelRefused(
                f"embedder: the tokenizer of {files.transformer} can't say where its tokens are in a text"
            )
        self._backend = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._head, self._tail = _special_tokens(self._backend)
        self._prefixes = {
            is_query: self._tokens(prefix).ids if prefix else []
            for is_query, prefix in ((True, files.query_prefix), (False, files.text_prefix))
        }
        self.batch_tokens = _CUDA_BATCH_TOKENS if device.type == "cuda" else _CPU_BATCH_TOKENS

    def passages(self, text: str, *, chunk_tokens: int, overlap_tokens: int, is_query: bool) -> list[Passage]:
        """The text in chunks of at most `chunk_tokens`, or what the model can read of it where that is less.

        With 0 it is one passage, cut off where the model can't read on. A text without tokens has none.
        """
        tokens = self._tokens(text)
        token_ids: list[int] = tokens.ids
        if not token_ids:
            return []
        starts = np.maximum.accumulate([start for start, _ in tokens.offsets]).tolist()
        head = [*self._head, *self._prefixes[is_query]]
        most = self._files.max_tokens - len(head) - len(self._tail)
        if chunk_tokens:
            size = min(chunk_tokens, most)
            spans = cut(text, starts, size=size, overlap=min(overlap_tokens, size // 2))
        else:
            last = min(len(starts), most)
            spans = [Span(0, starts[last] if last < len(starts) else len(text), 0, last)]
        return [Passage(span, [*head, *token_ids[span.first : span.last], *self._tail]) for span in spans]

    def vectors(self, passages: Sequence[Passage]) -> NDArray[np.float32]:
        """[len(passages), dim], each of unit length. A passage's is the same in any company, up to rounding."""
        lengths = torch.tensor([len(passage.token_ids) for passage in passages])
        mask = torch.arange(int(lengths.max())) < lengths[:, None]
        ids = torch.zeros(mask.shape, dtype=torch.long)  # the padding is masked: any token will do
        ids[mask] = torch.tensor([token_id for passage in passages for token_id in passage.token_ids])
        with torch.inference_mode(), beside_the_model(self._device):
            ids, mask = ids.to(self._device), mask.to(self._device)
            hidden = self._model(input_ids=ids, attention_mask=mask.long()).last_hidden_state
            pooled = _pool(self._files.pooling, hidden, mask)
            for layer in self._dense:
                pooled = layer(pooled)
            found: NDArray[np.float32] = torch.nn.functional.normalize(pooled, dim=1).cpu().numpy()
        return found

    def _tokens(self, text: str) -> Any:
        """A tokenizers.Encoding, without special tokens. A batch of one, because only batches let go of the GIL."""
        if self._files.lower_case:  # character by character: places in the text stay what they are
            text = "".join(lower if len(lower := character.lower()) == 1 else character for character in text)
        return self._backend.encode_batch([text], add_special_tokens=False)[0]


def _load_transformer(files: EmbedderFiles) -> torch.nn.Module:
    auto = AutoModelForTextEncoding if AutoConfig.from_pretrained(files.transformer).is_encoder_decoder else AutoModel
    model, loading = auto.from_pretrained(files.transformer, dtype=torch.float32, output_loading_info=True)
    if missing := sorted(key for key in loading["missing_keys"] if not key.startswith("pooler.")):
        raise ModelRefused(
            f"embedder: {files.transformer} lacks weights: {', '.join(missing[:5])} ({len(missing)} in all)"
        )
    model.config.use_cache = False  # of keys and values, which nobody would read
    loaded: torch.nn.Module = model
    return loaded


def _load_dense(folder: Path) -> torch.nn.Module:
    """A linear layer behind the pooling, and what follows it."""
    config = json.loads((folder / "config.json").read_text())
    kind = str(config.get("activation_function", "Tanh")).rpartition(".")[2]
    if kind not in _ACTIVATIONS or config.get("use_residual") or config.get("module_input_name", _POOLED) != _POOLED:
        raise ModelRefused(f"embedder: the layer in {folder} is not known: {config}")
    linear = torch.nn.Linear(config["in_features"], config["out_features"], bias=config.get("bias", True))
    file = folder / "model.safetensors"
    stored = load_file(file) if file.exists() else torch.load(folder / "pytorch_model.bin", weights_only=True)
    linear.load_state_dict({name.removeprefix("linear."): tensor.float() for name, tensor in stored.items()})
    return torch.nn.Sequential(linear, _ACTIVATIONS[kind]()).eval().requires_grad_(False)


def _special_tokens(backend: Any) -> tuple[list[int], list[int]]:
    """What the tokenizer puts in front of a text and behind it."""
    encoded = backend.encode_batch(["a"])[0]
    is_text = [not special for special in encoded.special_tokens_mask]
    first, last = is_text.index(True), len(is_text) - is_text[::-1].index(True)
    return encoded.ids[:first], encoded.ids[last:]


def _pool(mode: str, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[passages, width] of [passages, tokens, width]; `mask` [passages, tokens] is true where there is a token."""
    match mode:
        case "cls":
            return hidden[:, 0]
        case "lasttoken":
            return hidden[torch.arange(len(hidden), device=hidden.device), mask.sum(1) - 1]
        case "max":
            return hidden.masked_fill(~mask[:, :, None], -torch.inf).amax(1)
        case _:
            weights = mask[:, :, None].to(hidden.dtype)
            return (hidden * weights).sum(1) / weights.sum(1)
