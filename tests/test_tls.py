"""TLS between clients, front ends and workers: who proves what to whom, and certificates that are renewed."""

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc.aio
import pytest
from structlog.testing import capture_logs

from protos import rekindle_worker_pb2 as wpb
from protos.rekindle_worker_pb2_grpc import WorkerStub
from protos.tls import PLAIN_TEXT, ServerTls, Tls, listen, open_channel
from rekindle.client import Client
from rekindle.errors import Unavailable
from rekindle.settings import Settings
from rekindle.sync_client import Client as PlainClient
from server.app import Application
from server.config import ServerConfig
from server.directory import StaticAddresses
from tests.certificates import Authority, Issued
from tests.fake_engine import FakeEngine
from tests.fake_worker import FrontEnd, front_end
from tests.test_worker_service import CODEC
from worker.config import ConfigError, WorkerConfig
from worker.service import WorkerService, start_server


@pytest.fixture
def ours(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


@pytest.fixture
def theirs(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "theirs")


@pytest.fixture
async def front(ours: Authority) -> AsyncIterator[FrontEnd]:
    """A front end and two workers; each side of each connection proves itself."""
    served, worker = ours.issue("front-end"), ours.issue("worker", address="worker.internal")
    async with front_end(
        workers_tls=ServerTls(*worker, client_ca=ours.ca),
        tls_cert=served.cert,
        tls_key=served.key,
        tls_client_ca=ours.ca,
        worker_tls_ca=ours.ca,
        worker_tls_name="worker.internal",
    ) as front:
        yield front


def calling(front: FrontEnd, tls: Tls | None) -> Client:
    return Client(front.app.address, tls=tls, timeout_s=5.0, connect_timeout_s=0.5)


async def is_let_in(front: FrontEnd, tls: Tls | None) -> bool:
    async with calling(front, tls) as client:
        try:
            await client.generate("hi", max_new_tokens=1, timeout_s=5.0).read()
        except Unavailable as error:
            return error.answered
    return True


async def test_turns_and_sessions_go_through_where_every_side_proves_itself(front: FrontEnd, ours: Authority) -> None:
    async with calling(front, Tls(ours.ca, *ours.issue("client"))) as client:
        await client.create_session("s")
        await client.generate("hello", session_id="s", max_new_tokens=3).read()
        assert (await client.get_session("s", with_residency=True)).residency
        assert len((await client.stats()).workers) == 2


async def test_clients_without_a_certificate_of_ours_are_not_let_in(
    front: FrontEnd, ours: Authority, theirs: Authority
) -> None:
    assert await is_let_in(front, Tls(ours.ca, *ours.issue("client")))
    assert not await is_let_in(front, None)
    assert not await is_let_in(front, Tls(ours.ca))
    assert not await is_let_in(front, Tls(ours.ca, *theirs.issue("client")))


async def test_a_client_believes_only_the_authority_and_the_name_that_it_is_told(
    ours: Authority, theirs: Authority
) -> None:
    served = ours.issue("front-end", address="rekindle.internal")
    async with front_end(tls_cert=served.cert, tls_key=served.key) as front:
        assert await is_let_in(front, Tls(ours.ca, server_name="rekindle.internal"))
        assert not await is_let_in(front, Tls(ours.ca))
        assert not await is_let_in(front, Tls(theirs.ca, server_name="rekindle.internal"))
        assert not await is_let_in(front, Tls())


async def test_a_front_end_without_a_certificate_of_ours_gets_no_worker(ours: Authority, theirs: Authority) -> None:
    worker = ServerTls(*ours.issue("worker"), client_ca=ours.ca)
    good, bad = ours.issue("front-end"), theirs.issue("front-end")
    for shown, is_up in ((good, True), (bad, False)):
        settings = {"tls_cert": shown.cert, "tls_key": shown.key, "worker_tls_ca": ours.ca}
        async with front_end(num_workers=1, workers_tls=worker, **settings) as front:
            assert bool(front.app.directory.living()) == is_up
    async with front_end(num_workers=1, workers_tls=worker) as front:
        assert not front.app.directory.living()


async def test_the_real_workers_service_asks_for_a_certificate(ours: Authority) -> None:
    engine = FakeEngine()
    service = WorkerService(engine, CODEC, worker_id="w", model="m")
    server, address = await start_server(service, "127.0.0.1", tls=ServerTls(*ours.issue("worker"), client_ca=ours.ca))
    async with open_channel(address, Tls(ours.ca, *ours.issue("front-end")), ()) as channel:
        stub: Any = WorkerStub(channel)  # type: ignore[no-untyped-call]
        assert (await stub.Describe(wpb.DescribeRequest())).worker_id == "w"
    async with open_channel(address, Tls(ours.ca), ()) as channel:
        stub = WorkerStub(channel)  # type: ignore[no-untyped-call]
        with pytest.raises(grpc.aio.AioRpcError):
            await stub.Describe(wpb.DescribeRequest(), timeout=5)
    engine.close()
    await server.stop(grace=None)
    service.close()


@pytest.mark.parametrize(("host", "proves_itself"), [("127.0.0.1", False), ("0.0.0.0", True), ("0.0.0.0", False)])
async def test_a_worker_on_a_network_that_asks_nobody_for_a_certificate_says_so(
    ours: Authority, host: str, proves_itself: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("worker.service.listen", lambda *_, **__: 7)
    engine = FakeEngine()
    service = WorkerService(engine, CODEC, worker_id="w", model="m")
    tls = ServerTls(*ours.issue("worker"), client_ca=ours.ca if proves_itself else "")
    with capture_logs() as logs:
        server, _ = await start_server(service, host, tls=tls)
    await server.stop(grace=None)
    service.close()
    engine.close()
    is_open = host == "0.0.0.0" and not proves_itself
    assert [log["setting"] for log in logs] == (["worker_tls_client_ca"] if is_open else [])


async def test_a_renewed_certificate_is_shown_without_a_restart_and_open_connections_stay(
    ours: Authority, theirs: Authority, tmp_path: Path
) -> None:
    served = Issued(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    _replace(served, ours.issue("front-end"))
    async with front_end(tls_cert=served.cert, tls_key=served.key) as front, calling(front, Tls(ours.ca)) as client:
        await client.create_session("before")
        _replace(served, theirs.issue("front-end"))
        assert await is_let_in(front, Tls(theirs.ca))
        assert not await is_let_in(front, Tls(ours.ca))
        await client.get_session("before")


@pytest.mark.parametrize("broken", ["gone", "key of another", "nonsense"])
async def test_a_certificate_that_was_renewed_badly_leaves_the_old_one(
    broken: str, ours: Authority, tmp_path: Path
) -> None:
    served = Issued(str(tmp_path / "cert.pem"), str(tmp_path / "key.pem"))
    _replace(served, ours.issue("front-end"))
    async with front_end(tls_cert=served.cert, tls_key=served.key) as front:
        _break(served, broken, ours)
        assert await is_let_in(front, Tls(ours.ca))
        _replace(served, ours.issue("front-end"))
        assert await is_let_in(front, Tls(ours.ca))


def _break(files: Issued, how: str, authority: Authority) -> None:
    if how == "gone":
        Path(files.key).unlink()
    elif how == "key of another":
        _replace(files, Issued(files.cert, authority.issue("another").key))
    else:
        Path(files.cert).write_text("nonsense")


def _replace(files: Issued, by: Issued) -> None:
    """As who renews certificates does it: each file is exchanged at once."""
    for path, source in zip(files, by, strict=True):
        new = Path(path + ".new")
        new.write_bytes(Path(source).read_bytes())
        new.replace(path)


def test_files_that_cannot_be_read_keep_a_front_end_from_starting(ours: Authority, tmp_path: Path) -> None:
    missing = str(tmp_path / "missing.pem")
    config = ServerConfig(port=0, metrics_port=0, redis_url="memory://", tls_cert=missing, tls_key=missing)
    with pytest.raises(OSError, match=r"missing\.pem"):
        Application.build(config, StaticAddresses({}))
    with pytest.raises(OSError, match=r"missing\.pem"):
        Application.build(ServerConfig(redis_url="memory://", worker_tls_ca=missing), StaticAddresses({}))


def test_a_plain_client_whose_files_cannot_be_read_leaves_no_thread(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"missing\.pem"):
        PlainClient("127.0.0.1:1", tls=Tls(str(tmp_path / "missing.pem")))


class _Unbound:
    """Takes a port as a server does, without one: nothing here listens on a network."""

    def add_insecure_port(self, address: str) -> int:
        return 7


@pytest.mark.parametrize(
    ("host", "warned"), [("0.0.0.0", True), ("[::]", True), ("127.0.0.1", False), ("[::1]", False)]
)
async def test_plain_text_on_a_network_is_warned_of_by_the_setting_that_ends_it(host: str, warned: bool) -> None:
    server: Any = _Unbound()
    with capture_logs() as logs:
        assert listen(server, host, 0, PLAIN_TEXT, setting="tls_cert") == 7
    assert [(log["log_level"], log["setting"]) for log in logs] == ([("warning", "tls_cert")] if warned else [])


async def test_the_command_line_reaches_a_server_by_tls(front: FrontEnd, ours: Authority) -> None:
    client = ours.issue("client")
    words = ("stats", "--json", "--target", front.app.address, "--timeout-s", "5")
    shown = ("--tls-ca", ours.ca, "--tls-cert", client.cert, "--tls-key", client.key)
    assert await _status((*words, *shown)) == 0
    assert await _status((*words, *shown[:2])) == 1


async def _status(words: tuple[str, ...]) -> int | None:
    command = (sys.executable, "-m", "rekindle", *words)
    quiet = asyncio.subprocess.DEVNULL
    return await (await asyncio.create_subprocess_exec(*command, stdout=quiet, stderr=quiet)).wait()


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"tls_cert": "c"}, "tls_key"),
        ({"tls_client_ca": "c"}, "tls_cert"),
        ({"worker_tls_name": "c"}, "worker_tls_ca"),
        ({"worker_tls_ca": "c"}, "worker_tls_cert"),
        ({"worker_tls_cert": "c", "worker_tls_key": "k"}, "worker_tls_ca"),
        (
            {"worker_tls_cert": "c", "worker_tls_key": "k", "worker_tls_ca": "a", "worker_tls_client_ca": "a"},
            "needs tls_cert",
        ),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_name(values: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Settings.from_values(values)


def test_a_worker_and_a_client_take_a_certificate_only_with_its_key() -> None:
    with pytest.raises(ConfigError, match="tls_key"):
        WorkerConfig(tls_cert="c")
    with pytest.raises(ConfigError, match="tls_cert"):
        WorkerConfig(tls_client_ca="c")
    with pytest.raises(ValueError, match="key"):
        Tls(cert="c")
