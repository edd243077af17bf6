"""The model runner says what transformers says, however the work is cut up and wherever the KV lies."""

import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from tests.tiny_models import ARCHITECTURES, VOCAB_SIZE, generate, save_tiny_model, tiny_model
from worker.config import WorkerConfig
from worker.engine.step import Chunk
from worker.ids import BlockId
from worker.model.load import LoadedModel, load_model
from worker.model.runner import ModelRunner
from worker.tiers.kv_cache import KVCache

NUM_BLOCKS = 40
BLOCK_TOKENS = 16


@pytest.fixture(scope="module", params=ARCHITECTURES)
def loaded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = save_tiny_model(tmp_path_factory.mktemp("models") / request.param, request.param)
    return load_model(WorkerConfig(model=str(directory), block_tokens=BLOCK_TOKENS, device="cpu"))


def poisoned_runner(loaded: LoadedModel) -> tuple[ModelRunner, KVCache]:
    cache = KVCache(loaded.layout, NUM_BLOCKS, loaded.device)
    runner = ModelRunner(loaded, cache)
    cache.poison(BlockId(block) for block in range(NUM_BLOCKS))
    return runner, cache


def scattered_tables(number: int, *, seed: int = 0) -> list[list[BlockId]]:
    """Disjoint block tables whose neighbours are mostly none in the pool."""
    blocks = [BlockId(block) for block in range(NUM_BLOCKS)]
    random.Random(seed).shuffle(blocks)
    return [blocks[first::number] for first in range(number)]


def prompt_of(length: int, *, seed: int) -> list[int]:
    numbers = random.Random(seed)
    return [numbers.randrange(2, VOCAB_SIZE) for _ in range(length)]


def share_of(tokens: list[int], done: int, table: Sequence[BlockId], prompt_length: int, size: int) -> Chunk:
    """The next chunk of a sequence: at most `size` tokens of its prompt, or the token that it generated last."""
    end = min(done + size, prompt_length) if done < prompt_length else done + 1
    return Chunk(tokens[done:end], done, table, wants_logits=end >= prompt_length)


def decode_together(
    runner: ModelRunner, prompts: list[list[int]], sizes: list[int], num_tokens: int
) -> list[list[int]]:
    """Greedy replies to several prompts, each prefilled in chunks of its own size while others decode already."""
    tables = scattered_tables(len(prompts))
    tokens, done = [list(prompt) for prompt in prompts], [0] * len(prompts)
    while running := [i for i, prompt in enumerate(prompts) if len(tokens[i]) < len(prompt) + num_tokens]:
        chunks = [share_of(tokens[i], done[i], tables[i], len(prompts[i]), sizes[i]) for i in running]
        replies: Iterator[int] = iter(runner.run(chunks).argmax(-1).tolist())
        for i, chunk in zip(running, chunks, strict=True):
            done[i] += len(chunk.token_ids)
            if chunk.wants_logits:
                tokens[i].append(next(replies))
    return [sequence[len(prompt) :] for sequence, prompt in zip(tokens, prompts, strict=True)]


def test_greedy_replies_equal_those_of_generate_in_a_busy_batch(loaded: LoadedModel) -> None:
    prompts = [prompt_of(length, seed=length) for length in (61, 9, 100)]
    runner, _ = poisoned_runner(loaded)
    replies = decode_together(runner, prompts, sizes=[7, 5, 33], num_tokens=24)
    ours = tiny_model(loaded.model.config.model_type)
    assert replies == [generate(ours, prompt, 24) for prompt in prompts]
    assert len(set(replies[0])) > 3, "a reply that only repeats itself proves little"


def test_a_whole_prompt_in_one_chunk_and_alone_gives_the_logits_of_transformers(loaded: LoadedModel) -> None:
    prompt = prompt_of(90, seed=1)
    runner, _ = poisoned_runner(loaded)
    logits = runner.run([Chunk(prompt, 0, scattered_tables(1)[0], wants_logits=True)])
    with torch.inference_mode():
        wanted = tiny_model(loaded.model.config.model_type)(torch.tensor([prompt])).logits[0, -1:]
    assert logits.shape == (1, VOCAB_SIZE)
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, wanted, rtol=1e-3, atol=1e-3)


def test_a_later_turn_continues_over_blocks_that_went_out_and_came_back_elsewhere(loaded: LoadedModel) -> None:
    history, turn = prompt_of(64, seed=2), prompt_of(21, seed=3)
    runner, cache = poisoned_runner(loaded)
    first, second = scattered_tables(2)
    runner.run([Chunk(history, 0, first, wants_logits=False)])
    payload = memoryview(bytearray(loaded.layout.block_bytes))
    for source, target in zip(first[:4], second[:4], strict=True):
        cache.read_block(source, payload)
        cache.write_block(target, payload)
    cache.poison(first)
    logits = runner.run([Chunk(turn, 64, second, wants_logits=True)])
    assert int(logits.argmax()) == generate(tiny_model(loaded.model.config.model_type), history + turn, 1)[0]


def test_a_step_without_logits_returns_none_of_them(loaded: LoadedModel) -> None:
    runner, _ = poisoned_runner(loaded)
    assert runner.run([Chunk([5, 6, 7], 0, [BlockId(3)], wants_logits=False)]).shape == (0, VOCAB_SIZE)


def test_logits_come_only_for_chunks_that_want_them_and_in_their_order(loaded: LoadedModel) -> None:
    tables = scattered_tables(3)
    runner, _ = poisoned_runner(loaded)
    prompts = [prompt_of(length, seed=length) for length in (12, 30, 5)]
    alone = [
        runner.run([Chunk(prompt, 0, table, wants_logits=True)]) for prompt, table in zip(prompts, tables, strict=True)
    ]
    wanted = (True, False, True)
    together = runner.run(
        [Chunk(prompt, 0, table, want) for prompt, table, want in zip(prompts, tables, wanted, strict=True)]
    )
    torch.testing.assert_close(together, torch.cat([alone[0], alone[2]]), rtol=1e-4, atol=1e-4)


def test_bfloat16_stays_close_to_float32(tmp_path: Path) -> None:
    """Through packed weights, where the CPU has them."""
    directory = str(save_tiny_model(tmp_path / "model", "qwen3", initializer_range=0.05))
    prompt, table = prompt_of(40, seed=4), scattered_tables(1)[0]
    logits = []
    for dtype in ("float32", "bfloat16"):
        config = WorkerConfig(model=directory, dtype=dtype, block_tokens=BLOCK_TOKENS, device="cpu")
        logits.append(poisoned_runner(load_model(config))[0].run([Chunk(prompt, 0, table, wants_logits=True)])[0])
    assert torch.cosine_similarity(logits[0], logits[1], dim=0) > 0.99


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cuda_gives_the_same_replies(architecture: str, tmp_path: Path) -> None:
    directory = save_tiny_model(tmp_path / "model", architecture)
    on_cuda = load_model(WorkerConfig(model=str(directory), block_tokens=BLOCK_TOKENS, device="cuda"))
    prompts = [prompt_of(length, seed=length) for length in (61, 9, 100)]
    replies = decode_together(poisoned_runner(on_cuda)[0], prompts, sizes=[7, 5, 33], num_tokens=24)
    assert replies == [generate(tiny_model(architecture), prompt, 24) for prompt in prompts]
