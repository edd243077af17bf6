"""A step by one kernel is what the model's modules compute, and is left to them where the kernel can't know."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.test_runner import prompt_of, scattered_tables
from tests.tiny_models import save_tiny_model, tiny_model
from worker.attention.decode_kernel import load_decode_kernel
from worker.attention.prompt_kernel import load_prompt_kernel
from worker.config import WorkerConfig
from worker.engine.step import Chunk
from worker.ids import BlockId
from worker.model.fused_step import load_fused_step
from worker.model.load import LoadedModel, load_model
from worker.model.runner import ModelRunner
from worker.tiers.kv_cache import KVCache

NUM_BLOCKS = 40
BLOCK_TOKENS = 16
STEPS = 12
SHAPE: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 96, "head_dim": 32, "initializer_range": 0.1}
PROMPTS = (61, 9, 100, 1)


@pytest.fixture(autouse=True)
def _needs_a_kernel() -> None:
    if load_decode_kernel() is None:
        pytest.skip("no C compiler to build the kernels with")


def load(directory: Path, architecture: str, **changes: Any) -> LoadedModel:
    checkpoint = save_tiny_model(directory / "model", architecture, **{**SHAPE, **changes})
    return load_model(WorkerConfig(model=str(checkpoint), dtype="bfloat16", block_tokens=BLOCK_TOKENS, device="cpu"))


@pytest.fixture(params=["llama", "qwen2", "qwen3", "mistral"])
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def loaded(architecture: str, tmp_path: Path) -> LoadedModel:
    return load(tmp_path, architecture)


def runner_of(loaded: LoadedModel, *, by_modules: bool = False) -> tuple[ModelRunner, KVCache]:
    cache = KVCache(loaded.layout, NUM_BLOCKS, loaded.device)
    runner = ModelRunner(loaded, cache)
    assert runner._fused_step is not None
    if by_modules:
        runner._fused_step = None
    cache.poison(BlockId(block) for block in range(NUM_BLOCKS))
    return runner, cache


def forced(seed: int) -> list[int]:
    """What a sequence goes on with, whatever its logits say: so all ways to compute see the same tokens."""
    return prompt_of(STEPS, seed=1000 + seed)


def decode(
    runner: ModelRunner, lengths: Sequence[int], tables: Sequence[Sequence[BlockId]], *, order: Sequence[int]
) -> list[torch.Tensor]:
    """Each sequence's logits [STEPS, vocab] after its prompt, decoding together in rows of that order."""
    for number in order:
        runner.run([Chunk(prompt_of(lengths[number], seed=number), 0, tables[number], wants_logits=True)])
    logits = []
    for step in range(STEPS):
        chunks = [
            Chunk([forced(number)[step]], lengths[number] + step, tables[number], wants_logits=True) for number in order
        ]
        logits.append(runner.run(chunks))
    together = torch.stack(logits, dim=1)
    return [together[order.index(number)] for number in sorted(order)]


def test_it_is_as_near_to_the_float32_model_as_the_modules_are(loaded: LoadedModel, architecture: str) -> None:
    tables = scattered_tables(len(PROMPTS))
    order = range(len(PROMPTS))
    ours, cache = runner_of(loaded)
    theirs, other = runner_of(loaded, by_modules=True)
    by_kernel = decode(ours, PROMPTS, tables, order=order)
    by_modules = decode(theirs, PROMPTS, tables, order=order)
    exact_model = tiny_model(architecture, **SHAPE)
    errors = {"kernel": 0.0, "modules": 0.0}
    for number, length in enumerate(PROMPTS):
        tokens = [*prompt_of(length, seed=number), *forced(number)]
        with torch.inference_mode():
            exact = exact_model(torch.tensor([tokens])).logits[0, length:]
        errors["kernel"] += float((by_kernel[number] - exact).norm() / exact.norm())
        errors["modules"] += float((by_modules[number] - exact).norm() / exact.norm())
    assert errors["kernel"] <= 1.1 * errors["modules"]
    assert torch.equal(cache.data.isnan(), other.data.isnan()), "they write the same slots and no others"
    written = ~cache.data.isnan()
    difference = (cache.data[written].float() - other.data[written].float()).norm() / other.data[written].float().norm()
    assert difference < 0.02


def test_neither_batch_nor_place_changes_a_bit(loaded: LoadedModel) -> None:
    lengths = PROMPTS
    together = decode(runner_of(loaded)[0], lengths, scattered_tables(4), order=[2, 0, 3, 1])
    for number in range(4):
        alone = decode(runner_of(loaded)[0], lengths, scattered_tables(4, seed=9), order=[number])
        assert torch.equal(alone[0], together[number])


def test_a_prompt_in_the_same_step_changes_no_bit_of_a_decoding_sequence(loaded: LoadedModel) -> None:
    tables = scattered_tables(3)
    token = Chunk([7], PROMPTS[0], tables[0], wants_logits=True)
    new, silent = (
        Chunk(prompt_of(40, seed=5 + number), 0, tables[1 + number], wants_logits=not number) for number in range(2)
    )
    steps = {"alone": [token], "mixed": [new, token, silent]}
    logits = {}
    for name, chunks in steps.items():
        runner, _ = runner_of(loaded)
        runner.run([Chunk(prompt_of(PROMPTS[0], seed=0), 0, tables[0], wants_logits=False)])
        logits[name] = runner.run(chunks)
    first, _ = runner_of(loaded)
    assert torch.equal(logits["mixed"], torch.cat([first.run([new]), logits["alone"]]))


def test_a_short_chunk_of_a_prompt_has_the_same_bits_beside_others_and_elsewhere(loaded: LoadedModel) -> None:
    """A turn on a restored conversation, alone or in a busy batch."""
    if load_prompt_kernel() is None:
        pytest.skip("short chunks go to the modules here")
    history, turn = prompt_of(100, seed=0), prompt_of(33, seed=1)
    logits, kv = [], []
    for seed in (0, 9):
        runner, cache = runner_of(loaded)
        tables = scattered_tables(4, seed=seed)
        runner.run([Chunk(history, 0, tables[0], wants_logits=False)])
        runner.run([Chunk(prompt_of(50, seed=3), 0, tables[3], wants_logits=False)])
        chunk = Chunk(turn, 100, tables[0], wants_logits=True)
        others = [
            Chunk(prompt_of(90, seed=2), 0, tables[1], wants_logits=False),
            Chunk(prompt_of(64, seed=4), 0, tables[2], wants_logits=True),
            Chunk([5], 50, tables[3], wants_logits=True),
        ]
        logits.append(runner.run([chunk, *others] if seed else [chunk])[0])
        kv.append(torch.cat([cache.view(block) for block in tables[0]], 3)[:, :, :, :133])
    assert torch.equal(*logits)
    assert torch.equal(*kv)


def test_more_rows_than_the_kernels_take_at_once(tmp_path: Path) -> None:
    loaded = load(tmp_path, "qwen3")
    lengths = [1 + number % (BLOCK_TOKENS - STEPS) for number in range(NUM_BLOCKS)]
    how: dict[str, Any] = {"tables": [[BlockId(block)] for block in range(NUM_BLOCKS)], "order": range(NUM_BLOCKS)}
    ours = decode(runner_of(loaded)[0], lengths, **how)
    theirs = decode(runner_of(loaded, by_modules=True)[0], lengths, **how)
    torch.testing.assert_close(torch.stack(ours), torch.stack(theirs), rtol=0.1, atol=0.1)


def test_rows_that_want_no_logits_get_none(loaded: LoadedModel) -> None:
    runner, cache = runner_of(loaded)
    assert runner.run([Chunk([5], 0, [BlockId(3)], wants_logits=False)]).shape == (0, loaded.vocab_size)
    assert cache.view(BlockId(3))[:, :, :, 0].isfinite().all()
    chunks = [Chunk([5], 0, [BlockId(block)], wants_logits=block != 1) for block in range(3)]
    logits = runner.run(chunks)
    assert logits.shape == (2, loaded.vocab_size)
    assert torch.equal(logits[0], logits[1])


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("olmo2", {}),
        ("granite", {}),
        ("qwen3_moe", {}),
        ("llama", {"hidden_act": "gelu"}),
        ("llama", {"head_dim": 24}),
        ("llama", {"hidden_size": 80}),
    ],
)
def test_what_it_does_not_know_is_left_to_the_modules(
    tmp_path: Path, architecture: str, changes: dict[str, Any]
) -> None:
    loaded = load(tmp_path, architecture, **changes)
    cache = KVCache(loaded.layout, NUM_BLOCKS, loaded.device)
    runner = ModelRunner(loaded, cache)
    assert runner._fused_step is None
    assert runner.run([Chunk([5], 0, [BlockId(3)], wants_logits=True)]).isfinite().all()


def test_a_model_that_computes_something_else_than_its_kind_is_found_out(tmp_path: Path) -> None:
    loaded = load(tmp_path, "qwen3")
    pool = KVCache(loaded.layout, 1, loaded.device).data
    assert load_fused_step(loaded, pool, load_decode_kernel(), load_prompt_kernel()) is not None
    loaded.model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output * 2)
    assert load_fused_step(loaded, pool, load_decode_kernel(), load_prompt_kernel()) is None


def test_a_class_derived_from_a_known_one_is_not_known(tmp_path: Path) -> None:
    loaded = load(tmp_path, "qwen3")

    class Derived(type(loaded.model)):  # type: ignore[misc]
        pass

    loaded.model.__class__ = Derived
    pool = KVCache(loaded.layout, 1, loaded.device).data
    assert load_fused_step(dataclasses.replace(loaded), pool, load_decode_kernel(), load_prompt_kernel()) is None
