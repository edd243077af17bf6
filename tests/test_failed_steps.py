"""A request that can't be run fails alone: its neighbours go on, and the worker does not end for it."""

import gc
import weakref
from collections.abc import Callable, Sequence

import pytest
import torch

from tests.engines import EngineFactory, generate, start
from worker.calls import Failed, GenerateCall, Sampling, Token
from worker.engine.engine import Engine
from worker.engine.sampler import Sampler
from worker.engine.step import Chunk
from worker.engine.stepper import Runner
from worker.errors import Draining

PROMPT = tuple(range(5, 55))
OTHER = tuple(range(60, 90))
POISON = 400
"""A token that no prompt may have here."""


class Poisoned:
    """Runs no step with a prompt that has the token."""

    def __init__(self, runner: Runner, error: Callable[[], Exception]) -> None:
        self._runner, self._error = runner, error
        self.failed = 0

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        logits = self._runner.run(chunks)  # what a step writes before it fails is written again
        if any(POISON in chunk.token_ids and len(chunk.token_ids) > 1 for chunk in chunks):
            self.failed += 1
            raise self._error()
        return logits


def poisoned(engine: Engine, error: Callable[[], Exception]) -> Poisoned:
    runner = engine._stepper._runner = Poisoned(engine._stepper._runner, error)
    return runner


def test_one_that_fails_the_step_costs_its_neighbours_no_turn_and_no_token(build_engine: EngineFactory) -> None:
    alone = [generate(build_engine(), (), prompt, max_new_tokens=100).reply for prompt in (PROMPT, OTHER)]
    engine = build_engine()
    runner = poisoned(engine, lambda: torch.AcceleratorError("CUDA error: device-side assert triggered"))
    turns = [start(engine, (), prompt, max_new_tokens=100) for prompt in (PROMPT, OTHER)]
    firsts = [turn.next() for turn in turns]
    for _ in range(4):
        with pytest.raises(torch.AcceleratorError):
            generate(engine, (), (*PROMPT, POISON))
    for turn, first, reply in zip(turns, firsts, alone, strict=True):
        assert isinstance(first, Token)
        assert (first.token_id, *turn.result().reply) == reply
    assert runner.failed == 8, "each once beside the others, once alone"
    assert not engine.broken.done(), "the others ran"


@pytest.mark.parametrize("error", [IndexError("index out of range"), RuntimeError("no kernel image for 7 heads")])
def test_what_only_a_request_can_be_blamed_for_never_ends_a_worker(
    build_engine: EngineFactory, error: Exception
) -> None:
    engine = build_engine()
    poisoned(engine, lambda: error)
    for _ in range(4):
        with pytest.raises(type(error)):
            generate(engine, (), (*PROMPT, POISON))
    assert not engine.broken.done()
    assert generate(engine, (), PROMPT).reply


@pytest.mark.parametrize(
    "error",
    [
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling cublasGemmEx"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
    ],
)
def test_an_accelerator_that_fails_three_steps_in_a_row_ends_it(build_engine: EngineFactory, error: Exception) -> None:
    engine = build_engine()
    poisoned(engine, lambda: error)
    for _ in range(3):
        with pytest.raises(type(error)):
            generate(engine, (), (*PROMPT, POISON))
    engine.broken.result(5)


def test_an_error_does_not_keep_what_the_step_had_in_memory(build_engine: EngineFactory) -> None:
    engine = build_engine()
    activations: list[weakref.ref[torch.Tensor]] = []

    class OutOfMemory:
        def run(self, chunks: Sequence[Chunk]) -> torch.Tensor:
            held = torch.zeros(8)
            activations.append(weakref.ref(held))
            raise torch.OutOfMemoryError("CUDA out of memory")

    engine._stepper._runner = OutOfMemory()
    gc.disable()
    try:
        failed = start(engine, (), PROMPT).next()
        assert isinstance(failed, Failed)
        assert [held() for held in activations] == [None], "the next step needs that memory"
    finally:
        gc.enable()


def test_an_engine_whose_thread_fails_tells_its_turns_and_takes_no_more(
    build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine()
    turn = start(engine, (), PROMPT, max_new_tokens=400)
    assert isinstance(turn.next(), Token)

    def bug(now_s: float) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(engine._scheduler, "expire", bug)
    with pytest.raises(AssertionError, match="a bug"):
        turn.result()
    engine.broken.result(5)
    with pytest.raises(Draining):
        generate(engine, (), PROMPT)
    engine._thread.join(5)
    engine.close()


def test_a_turn_that_could_not_be_taken_in_leaves_its_place(
    build_engine: EngineFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = build_engine(max_waiting=2, max_running=1)
    call = GenerateCall(request_id="r", tenant="t", history=(), input=PROMPT, sampling=Sampling(), max_new_tokens=8)

    def no_room(*args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(Sampler, "start", no_room)
        for _ in range(5):
            with pytest.raises(torch.OutOfMemoryError):
                engine.submit(call, lambda event: None)
    assert generate(engine, (), PROMPT).reply
