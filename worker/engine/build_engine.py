"""From settings to a running engine: which part is told of which. Nothing is decided here."""

import random
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

from cache_store.master_keys import load_keyring
from worker.allocator import keep_freed_memory
from worker.attention.placing import Placer
from worker.attention.recall_choice import represent
from worker.attention.recall_kernel import load_look
from worker.block_changes import BlockChanges
from worker.config import WorkerConfig, parse_weights
from worker.engine.admission import Admission
from worker.engine.auditor import Auditor
from worker.engine.block_tables import BlockTables
from worker.engine.context_policies import UNIT_TOKENS, context_epochs
from worker.engine.conversations import Conversations
from worker.engine.cost_model import CostModel
from worker.engine.engine import Engine
from worker.engine.engine_figures import EngineFigures
from worker.engine.gather import Gatherer
from worker.engine.histories import Histories
from worker.engine.inbox import Inbox
from worker.engine.inserter import Inserter
from worker.engine.passages import Passages
from worker.engine.planner import ComputeAll, CostPlanner, LoadAll, Planner
from worker.engine.pool import BlockPool
from worker.engine.representatives import Representatives
from worker.engine.sampler import Sampler
from worker.engine.scheduler import Scheduler
from worker.engine.self_measure import measure_prefill, measure_store
from worker.engine.stepper import Stepper
from worker.engine.views import Views
from worker.model.load import LoadedModel, load_model
from worker.model.runner import ModelRunner
from worker.tiers.open_tiers import Tiers, open_tiers


def build_engine(config: WorkerConfig) -> Engine:
    """Load the model, take all memory, connect the tiers, and start. Raises ModelRefused, InvalidRequest."""
    # On a thread that ends: on a CPU it gets a team of kernel threads, which ends with it. Where the engine's is not
    # the only team, GNU's OpenMP finds more threads than cores and lets them sleep at every barrier: a step takes twice
    # as long, because they wake up on one core.
    with ThreadPoolExecutor(1, "load") as loader:
        engine = loader.submit(_build, config).result()
    engine.start()
    return engine


def _build(config: WorkerConfig) -> Engine:
    keyring = load_keyring(config.master_keys)
    loaded = load_model(config)
    if keyring is not None:
        loaded = replace(loaded, names_from=keyring.blinded(loaded.fingerprint), marks_from=keyring.marks_from)
    if loaded.device.type == "cpu":
        keep_freed_memory()
    return _wire(config, loaded, open_tiers(config, loaded, keyring))


def _wire(config: WorkerConfig, loaded: LoadedModel, tiers: Tiers) -> Engine:
    block_tokens = loaded.layout.block_tokens
    inbox = Inbox()
    device_changes = BlockChanges()
    pool = BlockPool(tiers.device.num_blocks, on_change=device_changes.tell)
    sampler = Sampler(loaded.vocab_size, loaded.device)
    auditor = Auditor(
        pool,
        rate=config.audit_rate,
        draw=random.Random().random,
        block_tokens=block_tokens,
        dtype=loaded.layout.dtype,
        discard=lambda names: inbox.ask(lambda future: histories.discard(names, future)),  # asked later than made
    )
    tables = BlockTables(
        pool,
        tiers.write_behind,
        tiers.restorer,
        tiers.prefetcher,
        block_tokens=block_tokens,
        restore_timeout_s=config.restore_timeout_s,
        copy_tokens=tiers.device.copy_tokens,
        make_room=auditor.give_way,
        post=inbox.post,
    )
    cost_model = CostModel(max_prefill_tokens=config.max_prefill_tokens)
    planner = _planner(config.restore_plan, cost_model, tiers)
    weights = parse_weights(config.tenant_weights)
    admission = Admission(
        max_requests=config.max_waiting + config.max_running,
        max_waiting_tokens=config.max_waiting_tokens,
        weights=weights,
    )
    kept = Representatives(partial(represent, unit_tokens=UNIT_TOKENS), max_bytes=config.representative_bytes)
    policies = context_epochs(config, loaded, tiers.device.num_blocks)
    gatherer = Gatherer(
        pool,
        tiers.restorer,
        timeout_s=config.restore_timeout_s,
        is_distrusted=lambda name: name in tables.distrusted,
        take=tables.take,
        post=inbox.post,
    )
    scheduler = Scheduler(
        tables,
        planner,
        auditor,
        cost_model,
        admission,
        block_tokens=block_tokens,
        max_running=config.max_running,
        weights=weights,
        gatherer=gatherer,
        passages=_passages(loaded, tiers, tables, gatherer, kept) if policies else None,
        inserter=_inserter(loaded, tiers, gatherer) if loaded.rope is not None else None,
    )
    runner = ModelRunner(loaded, tiers.device)
    if config.restore_plan == "auto" and config.self_measure_s:
        _measure(config, loaded, runner, cost_model, tiers)
    stepper = Stepper(
        scheduler,
        runner,
        sampler,
        auditor,
        cost_model,
        max_step_tokens=config.max_step_tokens,
        max_prefill_tokens=config.max_prefill_tokens,
    )
    histories = Histories(
        pool,
        tables,
        scheduler,
        tiers.write_behind,
        tiers.restorer,
        kept,
        marks_from=loaded.marks_from,
        restore_timeout_s=config.restore_timeout_s,
        post=inbox.post,
    )
    return Engine(
        config,
        loaded,
        tiers,
        inbox,
        pool,
        device_changes,
        sampler,
        auditor,
        admission,
        scheduler,
        stepper,
        histories,
        Conversations(loaded, policies, num_blocks=tiers.device.num_blocks),
        EngineFigures(
            scheduler,
            stepper,
            auditor,
            admission,
            pool,
            tiers,
            block_bytes=loaded.layout.block_bytes,
            max_running=config.max_running,
        ),
    )


def _passages(
    loaded: LoadedModel, tiers: Tiers, tables: BlockTables, gatherer: Gatherer, kept: Representatives
) -> Passages:
    assert loaded.rope is not None, "a model whose keys can't be turned has no policies"
    views = Views(
        tables,
        gatherer,
        Placer(tiers.device.data, loaded.rope),
        kept,
        load_look(),
        block_tokens=loaded.layout.block_tokens,
    )
    return Passages(tables, views)


def _inserter(loaded: LoadedModel, tiers: Tiers, gatherer: Gatherer) -> Inserter:
    assert loaded.rope is not None
    return Inserter(gatherer, Placer(tiers.device.data, loaded.rope), block_tokens=loaded.layout.block_tokens)


def _measure(
    config: WorkerConfig, loaded: LoadedModel, runner: ModelRunner, cost_model: CostModel, tiers: Tiers
) -> None:
    """Give three parts of the time to the model, one to the store."""
    layout, within_s = tiers.device.layout, config.self_measure_s
    measure_prefill(
        runner,
        cost_model,
        num_blocks=tiers.device.num_blocks,
        block_tokens=layout.block_tokens,
        max_tokens=config.max_prefill_tokens,
        max_context_tokens=loaded.max_context_tokens,
        within_s=0.75 * within_s,
    )
    if tiers.store is not None and tiers.store.available():
        measure_store(tiers.store, layout, tiers.transfers, within_s=0.25 * within_s)


def _planner(name: str, cost_model: CostModel, tiers: Tiers) -> Planner:
    if name == "load":
        return LoadAll()
    if name == "compute":
        return ComputeAll()
    return CostPlanner(cost_model, tiers.transfers, tiers.restorer.num_queued)
