"""Locks that are given up late: those that can be are not held up by those that can't."""

import asyncio

import pytest

from cache_store import late_releases
from cache_store.errors import StoreUnavailable
from cache_store.late_releases import LateReleases


async def test_a_part_of_a_cluster_that_stays_away_holds_up_nobody_elses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(late_releases, "_PAUSE_S", 0.001)
    released: list[str] = []
    all_others = asyncio.Event()

    async def release(tenant: str, session_id: str, holder: str) -> None:
        if session_id == "away":
            raise StoreUnavailable("its node is down")
        released.append(session_id)
        if len(released) == 3:
            all_others.set()

    late = LateReleases(release)
    for session_id in ("away", "a", "b", "c"):
        late.add("t", session_id, "holder", StoreUnavailable("no answer"))
    async with asyncio.timeout(5):
        await all_others.wait()
    assert released == ["a", "b", "c"]
    await late.aclose()
