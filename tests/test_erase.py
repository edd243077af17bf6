"""Who may erase a tenant, and what happens to what is in use meanwhile."""

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from rekindle.client import Client
from rekindle.errors import BadInput, Denied, NotFound, TimedOut
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


async def test_a_tenant_is_erased_on_the_command_line(front: FrontEnd, clients: Clients, keys: dict[str, str]) -> None:
    await clients["acme"].create_session("s")
    command = (sys.executable, "-m", "rekindle", "tenants", "erase", "acme", "--json", "--target", front.app.address)
    process = await asyncio.create_subprocess_exec(
        *command, "--api-key", keys["operators"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    printed, _ = await process.communicate()
    assert json.loads(printed)["sessions"] == 1
