"""A worker's tiers, from its device to the shared store, and what moves blocks between them: opened and closed as one.

Which blocks move is not known here.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from cache_store.disk_tier import DiskTier, open_disk_tier
from cache_store.frame import Framer, model_digest
from cache_store.host_slab import open_slab
from cache_store.host_tier import HostTier
from cache_store.ladder import Ladder, parse_ladder
from cache_store.open_store import open_block_store
from cache_store.sealing import Keyring, Purpose, Sealer
from cache_store.store import BlockStore
from worker.block_changes import BlockChanges
from worker.config import AUTO, WorkerConfig
from worker.model.load import LoadedModel
from worker.tiers.adopted import Adopted
from worker.tiers.ageing import Ager
from worker.tiers.codecs import open_codecs
from worker.tiers.coder import BlockCoder
from worker.tiers.kv_cache import KVCache
from worker.tiers.moves import MoveCounter, stand_back
from worker.tiers.prefetch import Prefetcher
from worker.tiers.restore import Restorer
from worker.tiers.shrink import Shrinker
from worker.tiers.transfer_costs import TransferCosts
from worker.tiers.write_behind import WriteBehind

_MIN_HOST_BLOCKS = 8
"""Restores land in host buffers first, so even a worker without a host tier has a few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiers:
    device: KVCache
    host: HostTier
    host_changes: BlockChanges
    disk: DiskTier | None
    store: BlockStore | None
    """None: this worker has no shared tier."""
    write_behind: WriteBehind
    restorer: Restorer
    prefetcher: Prefetcher | None
    """None where there is no shared tier to bring anything from, or nothing is ever restored."""
    moves: MoveCounter
    transfers: TransferCosts
    ager: Ager | None
    """None where no block can age."""
    adopted: Adopted | None
    """None where nothing was found, or there is nobody to ask about it."""

    def close(self, *, flush_s: float) -> None:
        """Write out what is queued for the store within `flush_s`, and let go of everything."""
        if self.adopted is not None:
            self.adopted.close()
        self.write_behind.close(flush_s=flush_s)
        if self.prefetcher is not None:
            self.prefetcher.close()
        self.restorer.close()
        if self.ager is not None:
            self.ager.close()
        if self.store is not None:
            self.store.close()
        if self.disk is not None:
            self.disk.close(flush_s=flush_s)
        self.device.unpin()
        self.host.close()


def open_tiers(config: WorkerConfig, loaded: LoadedModel, keyring: Keyring | None) -> Tiers:
    """Take all memory and connect the store; nothing ages until the ager is started. Raises InvalidRequest.

    With a `keyring` what goes to disk and store is sealed.
    """
    sealer = keyring.sealer(Purpose.BLOCKS) if keyring is not None else None
    layout, ladder = loaded.layout, parse_ladder(config.codec_ladder)
    device = KVCache(layout, loaded.num_device_blocks(config.device_cache_bytes), loaded.device)
    host_changes = BlockChanges()
    host = HostTier(
        open_slab(
            _host_folder(config),
            model_digest(loaded.fingerprint),
            capacity_bytes=max(config.host_cache_bytes, _MIN_HOST_BLOCKS * layout.block_bytes),
            block_bytes=layout.block_bytes,
        ),
        on_change=host_changes.tell,
    )
    if host.slab:
        device.pin(host.slab)
    disk = _open_disk(config, loaded, host, sealer)
    store = open_block_store(
        config.redis_url,
        layout,
        loaded.fingerprint,
        timeout_s=config.redis_timeout_s,
        refresh_ttl_s=config.block_ttl_s,
        sealer=sealer,
    )
    coder = BlockCoder(device, open_codecs(layout, loaded.rope, loaded.device), first_rung=ladder.first.name)
    moves = MoveCounter(layout.block_bytes)
    transfers = TransferCosts(layout.block_bytes)
    write_behind = WriteBehind(
        coder,
        host,
        store,
        moves,
        max_pinned_blocks=device.num_blocks,  # a prompt fills its blocks in a few steps, and each is offloaded once
        max_queued_stores=max(1, config.store_queue_bytes // layout.block_bytes),
        enabled=config.host_cache_bytes > 0 or store is not None or disk is not None,
        disk=disk,
    )
    return Tiers(
        device=device,
        host=host,
        host_changes=host_changes,
        disk=disk,
        store=store,
        write_behind=write_behind,
        restorer=Restorer(coder, host, store, moves, transfers, disk),
        prefetcher=_open_prefetcher(config, host, store, moves),
        moves=moves,
        transfers=transfers,
        ager=_open_ager(store, ladder, loaded),
        adopted=_open_adopted(host, disk, store, write_behind),
    )


def _host_folder(config: WorkerConfig) -> Path | None:
    """Where the host tier outlives this worker; None where it does not."""
    is_kept = config.host_cache_bytes > 0 and config.host_cache_dir not in ("", AUTO)
    return Path(config.host_cache_dir) if is_kept else None


def _open_prefetcher(
    config: WorkerConfig, host: HostTier, store: BlockStore | None, moves: MoveCounter
) -> Prefetcher | None:
    if store is None or config.restore_plan == "compute":
        return None
    return Prefetcher(host, store, moves, timeout_s=config.restore_timeout_s)


def _open_disk(config: WorkerConfig, loaded: LoadedModel, host: HostTier, sealer: Sealer | None) -> DiskTier | None:
    if not config.disk_dir or not config.disk_bytes:
        return None
    max_queued = min(config.store_queue_bytes // loaded.layout.block_bytes, host.use().capacity // 4)
    return open_disk_tier(
        Path(config.disk_dir),
        Framer(loaded.layout, loaded.fingerprint, sealer),
        capacity_bytes=config.disk_bytes,
        max_queued=max(1, max_queued),
        prepare_thread=stand_back,
    )


def _open_adopted(
    host: HostTier, disk: DiskTier | None, store: BlockStore | None, write_behind: WriteBehind
) -> Adopted | None:
    found = list({*host.blocks(), *(disk.blocks() if disk is not None else [])})
    return Adopted(found, store, lambda gone: sum(write_behind.forget(gone))) if found and store is not None else None


def _open_ager(store: BlockStore | None, ladder: Ladder, loaded: LoadedModel) -> Ager | None:
    """None where no block can age: nothing keeps it, or there is nothing to move it to."""
    shelf = store.ageing() if store is not None else None
    if shelf is None or len(ladder.rungs) == 1:
        return None
    codecs = open_codecs(loaded.layout, loaded.rope, torch.device("cpu"))  # where the store's bytes come to
    return Ager(shelf, ladder, Shrinker(loaded.layout, codecs), block_tokens=loaded.layout.block_tokens)
