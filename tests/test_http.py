"""Banks over HTTP: the same code, the same callers and the same errors as over gRPC."""

import asyncio
import http.client
import json
import ssl
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from cache_store.errors import InvalidRequest
from server.config import ConfigError, ServerConfig
from server.http_status import error_body, http_code
from server.status import failure_of
from tests.certificates import Authority, Issued
from tests.fake_worker import FrontEnd, front_end
from tests.systems import eventually
from tests.test_api_keys import add_key
from tests.test_front_metrics import scrape

DOG = "Rex is the dog of Ana."
BANKS = "/v1/memory/banks"


class Answer(NamedTuple):
    code: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.body.splitlines()]

    @property
    def error(self) -> Any:
        return self.json["error"]


async def ask(front: FrontEnd, verb: str, path: str, body: Any = None, *, key: str = "") -> Answer:
    """`body` is an object to be sent as JSON, or bytes as they are."""

    def call() -> Answer:
        connection = http.client.HTTPConnection(front.app.http_address, timeout=10)
        try:
            sent = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
            connection.request(verb, path, sent, {"Authorization": f"Bearer {key}"} if key else {})
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    return await asyncio.to_thread(call)


@pytest.fixture
async def front() -> AsyncIterator[FrontEnd]:
    async with front_end(1, http_port=0) as front:
        yield front


async def test_a_bank_is_made_filled_asked_and_deleted(front: FrontEnd) -> None:
    made = await ask(front, "POST", BANKS, {"name": "notes", "settings": {"read_tokens": 64}})
    assert (made.code, made.headers["content-type"], made.json["settings"]["read_tokens"]) == (
        200,
        "application/json",
        64,
    )
    entry = (await ask(front, "POST", f"{BANKS}/notes/entries", {"text": DOG, "metadata": {"of": "dogs"}})).json
    assert (entry["text"], entry["kind"], entry["metadata"]) == (DOG, "ENTRY_KIND_FACT", {"of": "dogs"})
    found = await ask(
        front, "POST", f"{BANKS}/notes/recall", {"query": "whose dog", "filter": {"metadata": {"of": "dogs"}}}
    )
    assert [one["entry"]["id"] for one in found.json["entries"]] == [entry["id"]]
    assert (await ask(front, "GET", f"{BANKS}/notes")).json["entries"] == "1"
    assert [bank["name"] for bank in (await ask(front, "GET", f"{BANKS}?page_size=5")).json["banks"]] == ["notes"]
    assert (await ask(front, "POST", f"{BANKS}/notes/forget", {"ids": [entry["id"]]})).json == {"entries": "1"}
    assert (await ask(front, "DELETE", f"{BANKS}/notes")).json == {"entries": "0"}
    samples = await scrape(front)
    assert samples["rekindle_front_requests_total{code=OK,method=Memory/Recall}"] == 1


async def test_documents_are_put_with_progress_line_by_line(front: FrontEnd) -> None:
    await ask(front, "POST", BANKS, {"name": "library"})
    documents = [{"id": "a", "text": "Wear goggles."}, {"id": "b", "text": "Close the door."}]
    put = await ask(front, "POST", f"{BANKS}/library/documents", {"documents": documents})
    assert put.headers["content-type"] == "application/jsonl"
    assert [(line["document_id"], line["documents_done"], line["new_chunks"]) for line in put.lines] == [
        ("a", 1, 1),
        ("b", 2, 1),
    ]
    bad = await ask(front, "POST", f"{BANKS}/library/documents", {"documents": [{"id": "no good", "text": "x"}]})
    assert (bad.code, bad.error["field"]) == (400, "documents[0].id")


async def test_an_error_in_the_midst_of_a_stream_is_its_last_line(front: FrontEnd) -> None:
    await ask(front, "POST", BANKS, {"name": "library"})
    worker = front.workers["0"]
    texts = [f"Text number {number}." for number in range(3)]

    async def is_embedding() -> bool:
        return bool(worker.embedded)

    worker.may_embed.clear()
    body = {"documents": [{"text": text} for text in texts]}
    put = asyncio.create_task(ask(front, "POST", f"{BANKS}/library/documents", body))
    await eventually(is_embedding)
    worker.refuse_with = InvalidRequest("texts[0]", "is not to my taste")  # from the second on
    worker.may_embed.set()
    answer = await put
    assert answer.code == 200
    first, last = answer.lines
    assert first["documents_done"] == 1
    assert last["error"]["status"] == "INVALID_ARGUMENT"


async def test_a_bank_goes_out_and_comes_back_as_lines(front: FrontEnd) -> None:
    for name in ("notes", "copy"):
        await ask(front, "POST", BANKS, {"name": name})
    for number in range(3):
        await ask(front, "POST", f"{BANKS}/notes/entries", {"text": f"Fact {number}, é."})
    out = await ask(front, "GET", f"{BANKS}/notes/export?with_vectors=true")
    assert [line["text"] for line in out.lines] == [f"Fact {number}, é." for number in range(3)]
    back = await ask(front, "POST", f"{BANKS}/copy/import", out.body)
    assert back.json == {"entries": "3", "new_entries": "3"}
    assert (await ask(front, "POST", f"{BANKS}/copy/reembed")).lines[-1]["entries_done"] == "3"
    broken = await ask(front, "POST", f"{BANKS}/copy/import", b"no json\n")
    assert (broken.code, broken.error["status"]) == (400, "INVALID_ARGUMENT")


async def test_errors_are_json_with_the_status_in_both_words(front: FrontEnd) -> None:
    gone = await ask(front, "GET", f"{BANKS}/nowhere")
    assert (gone.code, gone.error["status"], gone.error["reason"]) == (404, "NOT_FOUND", "BANK_NOT_FOUND")
    await ask(front, "POST", BANKS, {"name": "notes"})
    taken = await ask(front, "POST", BANKS, {"name": "notes"})
    assert (taken.code, taken.error["status"]) == (409, "ALREADY_EXISTS")
    for body, field in (
        ({"query": "a", "k": 101}, "k"),
        ({"query": "a", "kk": 1}, "body"),
        (b"{", "body"),
        ([], "body"),
    ):
        bad = await ask(front, "POST", f"{BANKS}/notes/recall", body)
        assert (bad.code, bad.error["field"]) == (400, field)
    assert (await ask(front, "GET", "/nothing/here")).error["status"] == "NOT_FOUND"
    assert (await ask(front, "PUT", BANKS)).code == 405


async def test_a_body_has_its_bounds() -> None:
    async with front_end(1, http_port=0, max_message_bytes=4096) as front:
        large = await ask(front, "POST", BANKS, {"name": "notes", "description": "x" * 5000})
        assert (large.code, large.error["message"]) == (400, "body: must have at most 4,096 bytes")


async def test_callers_show_their_keys_and_see_their_own_banks(tmp_path: Path) -> None:
    file = tmp_path / "keys.toml"
    keys = {tenant: add_key(file, tenant) for tenant in ("acme", "other")}
    async with front_end(1, http_port=0, api_keys=str(file)) as front:
        for key in ("", "rk_wrong"):
            refused = await ask(front, "POST", BANKS, {"name": "notes"}, key=key)
            assert (refused.code, refused.error["status"]) == (401, "UNAUTHENTICATED")
        assert (await ask(front, "POST", BANKS, {"name": "notes"}, key=keys["acme"])).code == 200
        assert (await ask(front, "GET", f"{BANKS}/notes", key=keys["other"])).code == 404
        assert (await ask(front, "GET", f"{BANKS}/notes", key=keys["acme"])).code == 200


async def test_who_hangs_up_stops_the_work(front: FrontEnd) -> None:
    await ask(front, "POST", BANKS, {"name": "library"})
    worker = front.workers["0"]
    worker.may_embed.clear()
    body = json.dumps({"documents": [{"text": "Wear goggles."}]}).encode()
    host, _, port = front.app.http_address.rpartition(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = f"POST {BANKS}/library/documents HTTP/1.1\r\nHost: h\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)

    async def is_embedding() -> bool:
        return bool(worker.embedded)

    async def is_cancelled() -> bool:
        samples = await scrape(front)
        return samples.get("rekindle_front_requests_total{code=CANCELLED,method=Memory/PutDocuments}") == 1

    await eventually(is_embedding)
    writer.close()
    await eventually(is_cancelled)
    worker.may_embed.set()


async def test_a_front_end_that_drains_takes_no_more_and_a_taken_port_is_said_so(front: FrontEnd) -> None:
    port = int(front.app.http_address.rpartition(":")[2])
    with pytest.raises(OSError, match="in use"):
        async with front_end(0, http_port=port):
            pass
    await front.app.drain()
    refused = await ask(front, "GET", BANKS)
    assert (refused.code, refused.error["reason"], refused.headers["retry-after"]) == (503, "SHUTTING_DOWN", "1")


async def test_it_is_served_by_tls_and_a_renewed_certificate_is_shown(tmp_path: Path) -> None:
    ours, theirs = Authority(tmp_path / "ours"), Authority(tmp_path / "theirs")
    issued = ours.issue("front-end")
    async with front_end(1, http_port=0, tls_cert=issued.cert, tls_key=issued.key) as front:
        assert await is_let_in(front, ours)
        renew(issued, theirs.issue("front-end"))
        assert await is_let_in(front, theirs)
        assert not await is_let_in(front, ours)
        renew(issued, Issued(issued.cert, ours.issue("another").key))
        assert await is_let_in(front, theirs), "key and certificate don't belong together: the old ones stay"


def renew(served: Issued, by: Issued) -> None:
    for old, new in zip(served, by, strict=True):
        Path(old).write_bytes(Path(new).read_bytes())


async def is_let_in(front: FrontEnd, authority: Authority) -> bool:
    """By who believes this authority."""

    def call() -> bool:
        trusting = ssl.create_default_context(cafile=authority.ca)
        connection = http.client.HTTPSConnection(front.app.http_address, timeout=10, context=trusting)
        try:
            connection.request("GET", BANKS)
            return connection.getresponse().status == 200
        except ssl.SSLCertVerificationError:
            return False
        finally:
            connection.close()

    return await asyncio.to_thread(call)


def test_ports_differ() -> None:
    with pytest.raises(ConfigError, match="metrics_port and http_port must differ"):
        ServerConfig(http_port=9464)


def test_a_failure_says_its_reason_field_and_delay() -> None:
    failed = failure_of(InvalidRequest("text", "must not be empty"), "id")
    assert http_code(failed) == 400
    assert error_body(failed)["error"] == {
        "status": "INVALID_ARGUMENT",
        "message": "text: must not be empty",
        "reason": "INVALID_FIELD",
        "field": "text",
    }
