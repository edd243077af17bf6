"""What is measured on an accelerator, part by part; the same code runs on a CPU with a tiny shape.

A part yields each figure as soon as it has it, and stops early when its time is up.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.bare_models import Ours, Theirs, random_prompt
from benchmarks.gpu_machine import link_bytes_per_s, memory_bytes_per_s, seconds
from benchmarks.gpu_shapes import bare_model, loaded_model
from worker.ids import BlockId
from worker.model.load import LoadedModel
from worker.tiers.kv_cache import KVCache


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What is measured on which device; sizes for one with tens of GiB unless told."""

    device: torch.device
    shapes: Sequence[str] = ("qwen3-0.6b", "qwen3-8b")
    contexts: Sequence[int] = (256, 1024, 8192)
    batches: Sequence[int] = (1, 8, 32, 128)
    decode_steps: int = 16
    rounds: int = 3
    copy_bytes: int = 1 << 30
    """Of the largest plain copy."""
    moved_blocks: int = 256
    threads: Sequence[int] = (1, 2, 4)
    crossover_shape: str = "qwen3-8b"
    histories: Sequence[int] = (512, 1024, 4096, 8192, 16_384, 32_768)
    chunk_tokens: int = 2048
    kv_share: float = 0.35
    """Of the device's free memory: what one side of a comparison may take for KV."""
    engine_preset: str = "qwen3-0.6b"
    requests: int = 32
    prompt_tokens: int = 256
    new_tokens: int = 64
    resumed_tokens: int = 8192


TimeUp = Callable[[], bool]
Line = dict[str, Any]
Part = Callable[[Setup, TimeUp], Iterator[Line]]


def limits(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """Bytes a second of the device's memory, and of its link to pinned host memory."""
    yield {"memory_gb_s": memory_bytes_per_s(setup.device, setup.copy_bytes) / 1e9, "bytes": setup.copy_bytes}
    for num_bytes in (setup.copy_bytes, 2 << 20):
        for to_device in (True, False):
            if not time_up():
                speed = link_bytes_per_s(setup.device, num_bytes, to_device=to_device)
                yield {"link_gb_s": speed / 1e9, "to_device": to_device, "bytes": num_bytes}


def decode(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """Tokens a second of greedy decoding, ours and transformers', and what reading weights and KV once would allow."""
    memory_bytes_s = memory_bytes_per_s(setup.device, setup.copy_bytes)
    for shape in setup.shapes:
        loaded, model = loaded_model(shape, setup.device), bare_model(shape, setup.device)
        for context in setup.contexts:
            for batch in setup.batches:
                if time_up():
                    return
                if batch * context * loaded.layout.token_bytes < setup.kv_share * _free_bytes(setup.device):
                    line = {"shape": shape, "context": context, "batch": batch}
                    yield line | _decode_speeds(setup, loaded, Theirs(model, batch), context, batch, memory_bytes_s)
                _tidy(setup.device)
        del loaded, model
        _tidy(setup.device)


def _decode_speeds(
    setup: Setup, loaded: LoadedModel, theirs: Theirs, context: int, batch: int, memory_bytes_s: float
) -> Line:
    ours = Ours(loaded, batch, context + setup.decode_steps)
    sides: dict[str, Callable[[int, int], float]] = {"rekindle": ours.decode, "transformers": theirs.decode}
    step_s: dict[str, list[float]] = {side: [] for side in sides}
    for number in range(setup.rounds + 1):
        for side, run in sides.items():
            took_s = run(context, setup.decode_steps) / setup.decode_steps
            if number:
                step_s[side].append(took_s)
    typical = {side: statistics.median(values) for side, values in step_s.items()}
    read_bytes = _weights_read(loaded) + batch * context * loaded.layout.token_bytes
    roofline_s = read_bytes / memory_bytes_s
    return {
        "rekindle_tokens_s": batch / typical["rekindle"],
        "transformers_tokens_s": batch / typical["transformers"],
        "roofline_tokens_s": batch / roofline_s,
        "share_of_roofline": roofline_s / typical["rekindle"],
    }


def blocks(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """Whole blocks between the device's pool and buffers in host memory, by so many threads, against a plain pinned
    copy of as many bytes. Every bit is compared, and destinations are poisoned."""
    for shape in setup.shapes:
        layout = loaded_model(shape, setup.device).layout
        _tidy(setup.device)
        cache = KVCache(layout, 2 * setup.moved_blocks, setup.device)
        cache.data.normal_()
        slab = memoryview(bytearray(setup.moved_blocks * layout.block_bytes))
        slots = [slab[at : at + layout.block_bytes] for at in range(0, len(slab), layout.block_bytes)]
        sources = [BlockId(2 * number) for number in range(setup.moved_blocks)]  # no two of them neighbours
        targets = [BlockId(2 * number + 1) for number in range(setup.moved_blocks)]
        for to_device in (False, True):
            plain = link_bytes_per_s(setup.device, len(slab), to_device=to_device)
            for threads in setup.threads:
                if time_up():
                    return
                cache.poison(targets)
                took_s = _move(setup, cache, targets if to_device else sources, slots, threads, to_device=to_device)
                speed = len(slab) / took_s
                yield {
                    "shape": shape,
                    "block_bytes": layout.block_bytes,
                    "direction": "restore" if to_device else "offload",
                    "threads": threads,
                    "gb_s": speed / 1e9,
                    "share_of_pinned_copy": speed / plain,
                }
        pairs = zip(sources, targets, strict=True)
        assert all(torch.equal(cache.view(source), cache.view(target)) for source, target in pairs), "bits were lost"
        del cache


def _move(
    setup: Setup,
    cache: KVCache,
    blocks: Sequence[BlockId],
    slots: Sequence[memoryview],
    threads: int,
    *,
    to_device: bool,
) -> float:
    """Seconds to move all blocks once."""
    copy = cache.write_block if to_device else cache.read_block
    with ThreadPoolExecutor(threads) as pool:
        return seconds(setup.device, lambda: list(pool.map(copy, blocks, slots)), rounds=setup.rounds)


def crossover(setup: Setup, time_up: TimeUp) -> Iterator[Line]:
    """From what rate on loading a history is quicker than computing it, and which is quicker from host memory here."""
    loaded = loaded_model(setup.crossover_shape, setup.device)
    restore_bytes_s = _restore_bytes_per_s(setup, loaded)
    for num_tokens in setup.histories:
        if time_up():
            return
        prefill_s = _prefill_s(setup, loaded, num_tokens)
        history_bytes = num_tokens * loaded.layout.token_bytes
        yield {
            "shape": setup.crossover_shape,
            "tokens": num_tokens,
            "prefill_s": prefill_s,
            "restore_s": history_bytes / restore_bytes_s,
            "ties_at_gb_s": history_bytes / prefill_s / 1e9,
            "quicker": "restore" if history_bytes / restore_bytes_s < prefill_s else "compute",
        }
        _tidy(setup.device)


def _restore_bytes_per_s(setup: Setup, loaded: LoadedModel) -> float:
    block_bytes = loaded.layout.block_bytes
    cache = KVCache(loaded.layout, setup.moved_blocks, setup.device)
    slots = [memoryview(bytearray(block_bytes)) for _ in range(setup.moved_blocks)]
    targets = [BlockId(number) for number in range(setup.moved_blocks)]
    took_s = _move(setup, cache, targets, slots, max(setup.threads), to_device=True)
    return setup.moved_blocks * block_bytes / took_s


def _prefill_s(setup: Setup, loaded: LoadedModel, num_tokens: int) -> float:
    ours = Ours(loaded, 1, num_tokens)
    prompt = random_prompt(num_tokens, loaded.vocab_size, seed=num_tokens)
    return seconds(setup.device, lambda: ours.prefill(prompt, setup.chunk_tokens), rounds=setup.rounds)


def _weights_read(loaded: LoadedModel) -> int:
    """By a step: of input embeddings only the rows that are wanted, unless they are the output's too."""
    model = loaded.model
    embeddings = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embeddings
    return loaded.weight_bytes - (0 if tied else embeddings.nbytes)


def _free_bytes(device: torch.device) -> int:
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else 1 << 30


def _tidy(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
