"""Who may erase a tenant, and what happens to what is in use meanwhile."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from cache_store.errors import StoreUnavailable
from protos import rekindle_pb2 as pb
from protos import rekindle_worker_pb2 as wpb
from rekindle.client import Client
from rekindle.errors import BadInput, Busy, Denied, NotFound, TimedOut, Unavailable
from server import tenants_service
from tests.fake_worker import FrontEnd, front_end
from tests.test_api_keys import add_key

Clients = dict[str, Client]


@pytest.fixture
async def keys(tmp_path: Path) -> dict[str, str]:
    file = tmp_path / "keys.toml"
    return {name: add_key(file, name, operator=name == "operators") for name in ("acme", "other", "operators")}


@pytest.fixture
async def front(keys: dict[str, str], tmp_path: Path) -> AsyncIterator[FrontEnd]:
    async with front_end(api_keys=str(tmp_path / "keys.toml")) as front:
        yield front


@pytest.fixture
async def clients(front: FrontEnd, keys: dict[str, str]) -> AsyncIterator[Clients]:
    async with AsyncExitStack() as stack:
        clients = {name: Client(front.app.address, api_key=key) for name, key in keys.items()}
        for client in clients.values():
            await stack.enter_async_context(client)
        yield clients


async def sessions_of(client: Client) -> list[str]:
    return sorted([session.session_id async for session in client.list_sessions()])


async def test_a_tenant_erases_itself_and_an_operator_anybody(clients: Clients) -> None:
    for name in ("acme", "other"):
        for number in range(40):  # more than are looked at together
            await clients[name].create_session(f"s-{number}")
    await clients["acme"].generate("hello", session_id="s-7", max_new_tokens=3).read()
    erased = await clients["acme"].erase_tenant()
    assert (erased.sessions, erased.tokens, erased.device_blocks) == (40, 8, 1)
    assert await sessions_of(clients["acme"]) == []
    assert len(await sessions_of(clients["other"])) == 40
    assert (await clients["operators"].erase_tenant("other")).sessions == 40
    assert (await clients["operators"].erase_tenant("nobody")).sessions == 0


async def test_nobody_else_may_and_a_name_that_is_none_is_refused(clients: Clients) -> None:
    await clients["acme"].create_session("s")
    for tenant in ("acme", "nobody", "?"):  # whether there is such a tenant shows in nothing
        with pytest.raises(Denied, match="PERMISSION_DENIED: only an operator may erase another tenant"):
            await clients["other"].erase_tenant(tenant)
    with pytest.raises(BadInput) as refused:
        await clients["operators"].erase_tenant("a b")
    assert refused.value.field == "tenant"
    assert await sessions_of(clients["acme"]) == ["s"]


async def test_a_turn_in_progress_ends_first_and_its_session_goes_then(front: FrontEnd, clients: Clients) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.2
    for session_id in ("busy", "idle"):
        await clients["acme"].create_session(session_id)
    turn = asyncio.create_task(clients["acme"].generate("hi", session_id="busy", max_new_tokens=4).read())
    await asyncio.sleep(0.2)
    with pytest.raises(TimedOut):
        await clients["acme"].erase_tenant(timeout_s=0.2)
    with pytest.raises(NotFound):
        await clients["acme"].get_session("idle")
    erased = await clients["acme"].erase_tenant()
    assert (erased.sessions, erased.tokens) == (1, 6)
    assert await turn


async def test_a_tenant_that_goes_on_meanwhile_does_not_keep_it_for_ever(
    front: FrontEnd, clients: Clients, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tenants_service, "_PATIENCE_S", 0.3)
    records = front.app._records
    for session_id in ("held", "free"):
        await clients["acme"].create_session(session_id)
    await records.begin("acme", "held", holder="somebody", lease_s=60)
    with pytest.raises(Busy, match="tenant acme goes on; 1 sessions were erased"):
        await clients["acme"].erase_tenant()
    await records.release("acme", "held", holder="somebody")
    assert (await clients["acme"].erase_tenant()).sessions == 1


async def test_it_ends_only_after_a_look_at_all_workers_that_found_nothing(front: FrontEnd, clients: Clients) -> None:
    first, second = front.workers.values()
    first.left_over = wpb.DropReply(device_blocks=1, redis_blocks=2)
    second.left_over = wpb.DropReply(host_blocks=4, disk_blocks=8)
    erased = await clients["acme"].erase_tenant()
    assert erased == pb.EraseTenantResponse(device_blocks=1, redis_blocks=2, host_blocks=4, disk_blocks=8)
    assert first.calls == ["erase+redis"] * 2
    assert second.calls == ["erase"] * 2


async def test_what_could_not_be_erased_is_no_success(front: FrontEnd, clients: Clients) -> None:
    front.workers["1"].refuse_with = StoreUnavailable("blocks are still on their way")
    with pytest.raises(Unavailable, match="still on their way"):
        await clients["acme"].erase_tenant()
    for worker in front.workers.values():
        await worker.kill()
    with pytest.raises(Unavailable):
        await clients["acme"].erase_tenant()


async def test_a_session_leaves_redis_under_the_names_of_every_model_that_is_served(
    front: FrontEnd, clients: Clients
) -> None:
    await clients["acme"].create_session("s")
    await clients["acme"].generate("hello", session_id="s", max_new_tokens=3).read()
    front.workers["1"].fingerprint = "cafe"
    await front.app.directory._poll()
    await clients["acme"].delete_session("s")
    assert [worker.calls[-1] for worker in front.workers.values()] == ["drop+redis"] * 2


async def test_a_tenant_is_erased_on_the_command_line(front: FrontEnd, clients: Clients, keys: dict[str, str]) -> None:
    await clients["acme"].create_session("s")
    command = (sys.executable, "-m", "rekindle", "tenants", "erase", "acme", "--json", "--target", front.app.address)
    process = await asyncio.create_subprocess_exec(
        *command, "--api-key", keys["operators"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    printed, _ = await process.communicate()
    assert json.loads(printed)["sessions"] == 1
