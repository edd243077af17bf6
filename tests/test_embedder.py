"""Sentence-embedding models: the default one, and what the files of others say."""

import json
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModel, BertConfig, BertModel, MPNetConfig, Qwen3Config, T5Config

import worker.model.embedder_files as embedder_files
from worker.errors import ModelRefused
from worker.model.embedder import Embedder
from worker.model.embedder_files import EmbedderFiles, read_embedder

CPU = torch.device("cpu")
WIDTH = 16


@pytest.fixture(scope="module")
def default() -> Embedder:
    return Embedder(read(""), CPU)


def read(name: Path | str) -> EmbedderFiles:
    files = read_embedder(str(name))
    assert files is not None
    return files


def embed(embedder: Embedder, *texts: str, is_query: bool = False) -> NDArray[np.float32]:
    options: Any = {"chunk_tokens": 0, "overlap_tokens": 0, "is_query": is_query}
    return embedder.vectors([passage for text in texts for passage in embedder.passages(text, **options)])


def test_the_default_model_knows_what_is_meant_and_says_so_before_it_is_loaded(default: Embedder) -> None:
    files = read("")
    assert (files.dim, files.max_tokens, files.pooling) == (384, 256, "mean")
    question, answer, other = embed(
        default, "Where does the cat sleep?", "The kitten naps on the sofa.", "Interest rates rose again."
    )
    assert question @ answer > question @ other + 0.3


def test_a_vector_is_the_same_in_any_company(default: Embedder) -> None:
    texts = [("word " * length).strip() + "." for length in (1, 3, 10, 50, 200)]
    together = embed(default, *texts)
    alone = np.concatenate([embed(default, text) for text in texts])
    assert np.abs(together - alone).max() < 1e-6
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-6)
    assert together.dtype == np.float32


def test_chunks_never_exceed_what_the_model_reads(default: Embedder) -> None:
    text = "The quick brown fox jumps over the lazy dog. " * 200
    passages = default.passages(text, chunk_tokens=4096, overlap_tokens=16, is_query=False)
    assert {len(passage.token_ids) <= 256 for passage in passages} == {True}
    assert (passages[0].span.start, passages[-1].span.end) == (0, len(text))
    for passage in passages[:-1]:
        assert text[: passage.span.end].rstrip().endswith("dog.")


def test_a_text_that_is_to_stay_whole_is_cut_off_where_the_model_can_not_read_on(default: Embedder) -> None:
    text = "word " * 1000
    (passage,) = default.passages(text, chunk_tokens=0, overlap_tokens=0, is_query=False)
    assert len(passage.token_ids) == 256
    assert passage.span.end == 254 * len("word ")
    assert default.passages(" \n", chunk_tokens=0, overlap_tokens=0, is_query=False) == []


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_embedding_wakes_no_team_of_kernel_threads(default: Embedder) -> None:
    def num_native() -> int:
        return len(os.listdir("/proc/self/task")) - threading.active_count()

    before = num_native()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(embed, default, "The quick brown fox. " * 40).result(30)
        assert num_native() == before


def saved(directory: Path, modules: str = "Transformer Pooling Normalize", **pooling: Any) -> Path:
    """A tiny model of sentence-transformers', with the default model's tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = BertConfig(
            hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, initializer_range=0.5
        )
        BertModel(config).save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(read("").transformer / name, directory)
    kinds = modules.split()
    listed = [{"type": f"a.b.{kind}", "path": f"{place}_{kind}" if place else ""} for place, kind in enumerate(kinds)]
    write(directory / "modules.json", listed)
    if pooling:
        write(directory / "1_Pooling" / "config.json", pooling)
    return directory


def write(file: Path, content: Any) -> None:
    file.parent.mkdir(exist_ok=True)
    file.write_text(json.dumps(content))


def hidden_states(directory: Path, text: str) -> NDArray[np.float32]:
    """[tokens, WIDTH], as transformers alone has them."""
    embedder = Embedder(read(directory), CPU)
    (passage,) = embedder.passages(text, chunk_tokens=0, overlap_tokens=0, is_query=False)
    with torch.inference_mode():
        found: NDArray[np.float32] = (
            BertModel.from_pretrained(directory).eval()(torch.tensor([passage.token_ids])).last_hidden_state[0].numpy()
        )
    return found


@pytest.mark.parametrize("mode", ["cls", "mean", "max", "lasttoken"])
def test_tokens_are_pooled_as_the_model_s_files_say(tmp_path: Path, mode: str) -> None:
    old = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "lasttoken": "lasttoken"}[mode]
    pooling: dict[str, Any] = {"word_embedding_dimension": WIDTH, f"pooling_mode_{old}": True}
    directory = saved(tmp_path / "old", **pooling)
    hidden = hidden_states(directory, "one two three")
    expected = {"cls": hidden[0], "mean": hidden.mean(0), "max": hidden.max(0), "lasttoken": hidden[-1]}[mode]
    vector, _ = embed(Embedder(read(directory), CPU), "one two three", "a much longer text beside it " * 3)
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)
    write(directory / "1_Pooling" / "config.json", {"embedding_dimension": WIDTH, "pooling_mode": mode})
    assert read(directory).pooling == mode, "in the words of later releases"


def test_a_plain_checkpoint_is_pooled_by_the_mean_and_reads_as_far_as_it_has_positions(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    (directory / "modules.json").unlink()
    files = read(directory)
    assert (files.pooling, files.max_tokens, files.dim) == ("mean", 512, WIDTH)


OTHERS = {
    "encoder of two": T5Config(d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=30_522),
    "causal": Qwen3Config(
        hidden_size=WIDTH,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
        vocab_size=30_522,
    ),
    "positions by padding": MPNetConfig(
        hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=30_522
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_embed_too_and_padding_is_not_seen(tmp_path: Path, kind: str) -> None:
    directory = saved(tmp_path, pooling_mode="lasttoken" if kind == "causal" else "mean")
    (directory / "model.safetensors").unlink()
    AutoModel.from_config(OTHERS[kind]).save_pretrained(directory)
    embedder = Embedder(read(directory), CPU)
    texts = ("one two", "three four five six seven eight nine ten", "eleven")
    alone = np.concatenate([embed(embedder, text) for text in texts])
    assert alone.shape == (3, WIDTH)
    assert np.abs(embed(embedder, *texts) - alone).max() < 1e-5
    assert alone[0] @ alone[2] < 0.9999


def test_a_linear_layer_behind_the_pooling_is_applied(tmp_path: Path) -> None:
    directory = saved(tmp_path, "Transformer Pooling Dense Normalize", pooling_mode="mean")
    weight = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1))
    folder = directory / "2_Dense"
    write(
        folder / "config.json",
        {"in_features": WIDTH, "out_features": 4, "bias": False, "activation_function": "x.Tanh"},
    )
    torch.save({"linear.weight": weight}, folder / "pytorch_model.bin")
    assert read(directory).dim == 4
    expected = np.tanh(weight.numpy() @ hidden_states(directory, "one two").mean(0))
    (vector,) = embed(Embedder(read(directory), CPU), "one two")
    np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=1e-5)


def test_questions_and_texts_get_the_prefixes_that_the_model_was_trained_with(tmp_path: Path) -> None:
    directory = saved(tmp_path, pooling_mode="mean")
    prompts = {"query": "query: ", "passage": "passage: "}
    write(directory / "config_sentence_transformers.json", {"prompts": prompts})
    with_prompts = Embedder(read(directory), CPU)
    (directory / "config_sentence_transformers.json").unlink()
    without = Embedder(read(directory), CPU)
    for is_query, name in ((True, "query"), (False, "passage")):
        vectors = embed(with_prompts, "one two", is_query=is_query)
        np.testing.assert_allclose(vectors, embed(without, prompts[name] + "one two"), atol=1e-6)
    (passage,) = with_prompts.passages("one two", chunk_tokens=0, overlap_tokens=0, is_query=True)
    assert (passage.span.start, passage.span.end) == (0, len("one two")), "places are those in the text alone"


def test_the_digest_changes_with_all_that_changes_vectors(tmp_path: Path) -> None:
    directory = saved(tmp_path / "a", pooling_mode="mean")
    digests = [read(directory).digest]
    assert read(shutil.copytree(directory, tmp_path / "b")).digest == digests[0], "it depends on where the model lies"
    write(directory / "1_Pooling" / "config.json", {"pooling_mode": "cls"})
    digests.append(read(directory).digest)
    write(directory / "config_sentence_transformers.json", {"prompts": {"query": "query: "}})
    digests.append(read(directory).digest)
    write(directory / "sentence_bert_config.json", {"max_seq_length": 128})
    digests.append(read(directory).digest)
    (directory / "model.safetensors").write_bytes(b"other weights")
    digests.append(read(directory).digest)
    assert len(set(digests)) == 5


@pytest.mark.parametrize(
    ("modules", "pooling", "said"),
    [
        ("Transformer Pooling CNN", {"pooling_mode": "mean"}, "CNN"),
        ("Pooling Transformer", {"pooling_mode": "mean"}, "Pooling, Transformer"),
        ("Transformer Pooling", {"pooling_mode_weightedmean_tokens": True}, "weightedmean"),
        ("Transformer Pooling", {"pooling_mode": ["cls", "mean"]}, "cls"),
        ("Transformer Pooling", {"pooling_mode": "mean", "include_prompt": False}, "prompt"),
        ("Transformer Pooling", {}, "config.json"),
    ],
)
def test_what_can_not_be_followed_is_refused_by_name(
    tmp_path: Path, modules: str, pooling: dict[str, Any], said: str
) -> None:
    with pytest.raises(ModelRefused, match=said):
        read_embedder(str(saved(tmp_path, modules, **pooling)))


def test_weights_that_are_missing_are_named(tmp_path: Path) -> None:
    directory = saved(tmp_path, pooling_mode="mean")
    config = json.loads((directory / "config.json").read_text())
    write(directory / "config.json", config | {"num_hidden_layers": 2})
    with pytest.raises(ModelRefused, match="lacks weights"):
        Embedder(read(directory), CPU)


def test_none_is_none_and_a_default_that_is_not_installed_is_missed_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert read_embedder("none") is None
    monkeypatch.setattr(embedder_files, "_DEFAULT_PACKAGE", "a_package_that_is_not_there")
    with pytest.raises(ModelRefused, match="a-package-that-is-not-there"):
        read_embedder("")
