"""One step over the batch: plan, run, sample, publish. Used by the engine's thread alone."""

import time
from collections.abc import Collection, Sequence
from typing import Protocol

import structlog
import torch

from worker.calls import FinishReason, Token
from worker.engine.auditor import Auditor
from worker.engine.cost_model import CostModel
from worker.engine.plan import Span, plan_step
from worker.engine.request import Phase, Request
from worker.engine.sampler import LogitsNotFinite, Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.step import Chunk

log = structlog.get_logger(__name__)

_AUDITS_SHARE = 4
"""Audits get one part in so many of a step, at the most."""
_HELD_SHARE = 0.02
"""Prompts are held back for others by so much of the time that they take, at the most."""
_OF_THE_ACCELERATOR = ("CUDA error", "can't allocate memory")
"""What its errors say that have no class of their own: cuBLAS's, and a CPU's allocator's."""

Work = Sequence[tuple[Request, Sequence[Span]]]
"""What each request runs in a step; every one of them has something."""


class Runner(Protocol):
    """A worker.model.runner.ModelRunner."""

    def run(self, chunks: Sequence[Chunk]) -> torch.Tensor: ...


class Stepper:
    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        sampler: Sampler,
        auditor: Auditor,
        cost_model: CostModel,
        *,
        max_step_tokens: int,
        max_prefill_tokens: int,
    ) -> None:
        self._scheduler = scheduler
        self._runner = runner
        self._sampler = sampler
        self._auditor = auditor
        self._cost_model = cost_model
        self._max_step_tokens = max_step_tokens
        self._max_prefill_tokens = max_prefill_tokens
        self.num_failed = 0
        """Steps that the accelerator failed, since the last one that it did not."""
        self._decode_step_s = 0.0
        self.prefill_s_saved = 0.0
        """Seconds that computing what came from a tier would have taken, as each prompt was done."""

    def queue_s(self) -> float:
        """What is to be computed of prompts now, and a step of those that decode: a new prompt waits for both."""
        running = self._scheduler.running
        decode_s = self._decode_step_s if any(request.phase is Phase.DECODE for request in running) else 0.0
        return decode_s + sum(self._cost_model.prefill_s(gap) for request in running for gap in request.gaps)

    def token_s(self) -> float:
        """To compute a token of a prompt that fills a step."""
        return self._cost_model.prefill_s(Span(0, self._max_prefill_tokens)) / self._max_prefill_tokens

    def held_s(self, now_s: float) -> float:
        """Seconds to wait, before the next step, for prompts whose blocks are still being looked for.

        A step over several prompts takes less than one after another, and who comes with others is looked for a few
        milliseconds longer than the first of them. Never while anybody decodes or computes ahead of what is to come.
        """
        running = self._scheduler.running
        ready = [request for request in running if request.phase is Phase.PREFILL]
        others = [request for request in running if request.phase is not Phase.PREFILL]
        if not ready or not others or any(request.phase is Phase.DECODE or request.gaps for request in others):
            return 0.0
        gaps = [gap for request in ready for gap in request.gaps]
        if sum(gap.tokens for gap in gaps) >= self._max_prefill_tokens:
            return 0.0
        held_back_s = _HELD_SHARE * sum(map(self._cost_model.prefill_s, gaps))
        return max(0.0, min(request.restored_s for request in ready) + held_back_s - now_s)

    def step(self) -> bool:
        """Run one step over the batch. False if there was nothing to run."""
        self._scheduler.grow()
        work, num_prefilled = self._plan()
        num_decoding = sum(request.phase is Phase.DECODE for request, _ in work)
        audit_chunks = self._auditor.plan(self._room_for_audits(num_decoding, num_prefilled))
        if not work and not audit_chunks:
            return False
        began = time.perf_counter()
        failed = self._attempt(work, audit_chunks)
        if failed is not None:
            self._recover(work, failed)
            return True
        if num_decoding and not num_prefilled:
            self._decode_step_s += 0.2 * (time.perf_counter() - began - self._decode_step_s)
        if num_prefilled and not num_decoding:  # without a prompt, an audit may have had its part in the time
            self._cost_model.ran([span for _, spans in work for span in spans], time.perf_counter() - began)
        return True

    def _attempt(self, work: Work, audit_chunks: list[Chunk]) -> Exception | None:
        """Run it all and publish what comes of it; or return what it failed with, and nothing has come of it."""
        chunks = [
            Chunk(
                request.tokens[span.start : span.end],
                request.place_of(span.start),
                request.table,
                request.samples_after(span),
                self._scheduler.hears(request, span),
            )
            for request, spans in work
            for span in spans
        ]
        choosing = [request for request, spans in work if request.samples_after(spans[-1])]
        try:
            logits, audit_chunks = self._run(chunks, audit_chunks)
            asking = {request for request, spans in work if self._scheduler.asks(request, spans[-1])}
            tokens = self._sample_all_but(asking, logits[: len(choosing)], choosing)
        except Exception as error:  # an accelerator out of memory, say: the step is lost, the engine is not
            log.error("a step failed", requests=len(work), exc_info=error)
            return error.with_traceback(None)  # whose frames hold the accelerator's memory
        self.num_failed = 0
        for request, spans in work:
            if request in asking:
                self._scheduler.run_again(request)
            elif request.phase is not Phase.OVER:
                self._scheduler.computed(request, spans)
        for request, token in tokens:
            self._publish(request, token)
        if audit_chunks:
            self._compare(audit_chunks, logits[len(choosing) :])
        return None

    def _recover(self, work: Work, error: Exception) -> None:
        """After a step that failed: who can't be run fails, alone, and does not end the others' turns or the worker.

        Each is run once more by itself: a chunk that is run again writes what it wrote.
        """
        self._auditor.give_way()
        num_well = 0
        for request, spans in work:
            if request.cancelled:
                continue
            failed = self._attempt([(request, spans)], []) if len(work) > 1 else error
            if failed is None:
                num_well += 1
            else:
                self._scheduler.fail(request, failed)
                error = failed
        if not num_well and _is_accelerators(error):
            self.num_failed += 1

    def _run(self, chunks: list[Chunk], audit_chunks: list[Chunk]) -> tuple[torch.Tensor, list[Chunk]]:
        """Run both. Where that fails, the audit is lost, and the turns run once more without it: a chunk that is run
        again writes what it wrote. Returns the logits, and those of the audit's chunks that were run."""
        try:
            return self._runner.run([*chunks, *audit_chunks]), audit_chunks
        except Exception as error:
            if not chunks or not audit_chunks:
                raise
            log.error("a step with an audit failed", exc_info=error)
        self._auditor.give_way()
        return self._runner.run(chunks), []  # only here, where the error holds no memory of the accelerator's

    def _compare(self, chunks: Sequence[Chunk], logits: torch.Tensor) -> None:
        """Tell the auditor what came of its chunks. Where it fails, the audit is lost; the turns have their tokens."""
        try:
            self._auditor.ran(chunks, logits)
        except Exception as error:  # the accelerator may have no room for the comparison
            log.error("an audit failed", exc_info=error)
            self._auditor.give_way()

    def _plan(self) -> tuple[Work, int]:
        """What each request runs in this step, and how many tokens of prompts that is."""
        decoding = [request for request in self._scheduler.running if request.phase is Phase.DECODE]
        prompts = self._scheduler.prompts
        room = self._max_step_tokens if decoding else self._max_prefill_tokens
        planned = plan_step(len(decoding), [request.gaps for request in prompts], room)
        work = [(request, [Span(len(request.tokens) - 1, len(request.tokens))]) for request in decoding]
        work += [(request, spans) for request, spans in zip(prompts, planned, strict=True) if spans]
        return work, sum(span.tokens for spans in planned for span in spans)

    def _room_for_audits(self, num_decoding: int, num_prefilled: int) -> int:
        """None beside a prompt, whose first token somebody waits for; else few, so that whoever comes waits little."""
        if num_prefilled:
            return 0
        return min(-(-self._max_step_tokens // _AUDITS_SHARE), self._max_step_tokens - num_decoding)

    def _sample_all_but(
        self, asking: Collection[Request], logits: torch.Tensor, requests: Sequence[Request]
    ) -> list[tuple[Request, Token]]:
        """The next token of each request that is not run again."""
        if not asking:
            return self._sample(logits, requests)
        rows = [row for row, request in enumerate(requests) if request not in asking]
        return self._sample(logits[rows], [requests[row] for row in rows])

    def _sample(self, logits: torch.Tensor, requests: Sequence[Request]) -> list[tuple[Request, Token]]:
        """The next token of each request ([n, vocab] logits). A request whose logits are not finite fails, alone."""
        try:
            tokens = self._sampler.sample(logits, [request.row for request in requests])
        except LogitsNotFinite as error:
            for row in error.rows:
                self._scheduler.fail(requests[row], error)
            rest = [row for row in range(len(requests)) if row not in error.rows]
            return self._sample(logits[rest], [requests[row] for row in rest])
        self._auditor.watch(requests, logits)
        return list(zip(requests, tokens, strict=True))

    def _publish(self, request: Request, token: Token) -> None:
        if not request.first_token_s:
            request.first_token_s = time.monotonic()
            self.prefill_s_saved += sum(self._cost_model.prefill_s(span) for span in request.spared)
        ending = _ending(request)  # of a reply that was complete when its worker was lost
        if ending is None:
            request.tokens.append(token.token_id)
            request.row.append(token.token_id)
            request.listener(token)
            ending = _ending(request)
        if ending is not None:
            self._scheduler.finish(request, ending)


def _is_accelerators(error: Exception) -> bool:
    """Is it the accelerator that failed, and not the request? A worker that lost the one is no use to the others."""
    kinds = (torch.AcceleratorError, torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or any(words in str(error) for words in _OF_THE_ACCELERATOR)


def _ending(request: Request) -> FinishReason | None:
    """Why the reply ends with its last token; None where it goes on."""
    if not request.num_generated:
        return None
    if request.tokens[-1] in request.call.stop_token_ids:
        return FinishReason.STOP
    if request.tokens[-1] in request.call.eos_token_ids:
        return FinishReason.EOS
    return FinishReason.LENGTH if request.num_generated >= request.max_new_tokens else None
