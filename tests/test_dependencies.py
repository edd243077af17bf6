"""The audit of what is pinned (`make audit`), by a database of vulnerabilities of our own."""

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LOCK = ROOT / "requirements.lock"
WELL_KNOWN = {"jinja2==2.10": "CVE-2019-10906"}


class Database(ThreadingHTTPServer):
    """Answers as OSV does. `known` has ids of vulnerabilities by release; who asks for `breaks_at` gets an error."""

    def __init__(self, known: Mapping[str, str], breaks_at: str = "") -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.known, self.breaks_at = known, breaks_at
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1/query"


class _Answer(BaseHTTPRequestHandler):
    server: Database

    def do_POST(self) -> None:
        query = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        release = f"{query['package']['name']}=={query['version']}"
        self.server.asked.append(release)
        answer = json.dumps(
            {"vulns": [_entry(release, self.server.known[release])]} if release in self.server.known else {}
        )
        self.send_response(500 if release == self.server.breaks_at else 200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer.encode())

    def log_message(self, *_: object) -> None:
        """Not on the tests' stderr."""


def _entry(release: str, name: str) -> dict[str, object]:
    package = {"name": release.partition("==")[0], "ecosystem": "PyPI"}
    ranges = [{"type": "ECOSYSTEM", "events": [{"introduced": "0"}, {"fixed": "99.0"}]}]
    return {"id": name, "summary": "bad", "affected": [{"package": package, "ranges": ranges}]}


@contextmanager
def database(known: Mapping[str, str], breaks_at: str = "") -> Iterator[Database]:
    with Database(known, breaks_at) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def audit(lock: Path, url: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, str(ROOT / ".ci" / "audit.py"), str(lock), "--osv-url", url]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture
def lock(tmp_path: Path) -> Path:
    file = tmp_path / "requirements.lock"
    file.write_text("attrs==26.1.0\nredis==8.1.0\n")
    return file


def test_every_release_of_our_lock_is_looked_up() -> None:
    with database(WELL_KNOWN) as server:
        audited = audit(LOCK, server.url)
    assert audited.returncode == 0, audited.stdout + audited.stderr
    pinned = {re.sub(r"[_.](?=.*==)", "-", line.lower()) for line in LOCK.read_text().split()}
    assert {*server.asked} == pinned | WELL_KNOWN.keys()
    assert f"{len(pinned)} releases audited by osv: 0 known vulnerabilities" in audited.stdout


def test_a_pinned_release_that_is_known_to_be_vulnerable_fails(lock: Path) -> None:
    with database(WELL_KNOWN | {"redis==8.1.0": "PYSEC-1"}) as server:
        audited = audit(lock, server.url)
    assert audited.returncode == 1
    assert "VULNERABLE: redis 8.1.0: PYSEC-1; fixed in 99.0" in audited.stdout


def test_a_database_that_does_not_even_know_a_famous_vulnerability_is_not_relied_upon(lock: Path) -> None:
    with database({"redis==8.1.0": "PYSEC-1"}) as server:
        audited = audit(lock, server.url)
    assert (audited.returncode, server.asked) == (0, [*WELL_KNOWN])
    assert "was NOT audited: no database can be reached (osv: answers, but knows of no" in audited.stdout


def test_where_no_database_can_be_reached_the_audit_is_skipped_with_a_notice(lock: Path) -> None:
    with Database({}) as closed:
        url = closed.url
    audited = audit(lock, url)
    assert audited.returncode == 0
    assert "was NOT audited: no database can be reached (osv: requests.exceptions.ConnectionError" in audited.stdout


def test_an_audit_that_breaks_off_is_not_taken_for_one_that_found_nothing(lock: Path) -> None:
    with database(WELL_KNOWN, breaks_at="redis==8.1.0") as server:
        audited = audit(lock, server.url)
    assert audited.returncode == 1
    assert "pip-audit failed: pip_audit._service.interface.ServiceError" in audited.stderr
