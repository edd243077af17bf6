"""The command line as it is typed: where options come from, what help says, and commands against a real front end."""

import asyncio
import io
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from protos import rekindle_pb2 as pb
from rekindle import cli, serve
from rekindle.chat import Chat
from rekindle.settings import Settings
from rekindle.sync_client import Client
from tests.fake_worker import FrontEnd, front_end

Run = Callable[..., str]


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def rekindle(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command line and return what it printed; the exit status must be as expected."""

    def run(*words: str, status: int = 0) -> str:
        capsys.readouterr()  # what the front end has logged
        with pytest.raises(SystemExit) as ended:
            cli.make_app().meta(words)
        code = ended.value.code
        assert (1 if isinstance(code, str) else code or 0) == status, code
        output = capsys.readouterr()
        return output.out + output.err + (code if isinstance(code, str) else "")

    return run


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Settings]:
    """The settings that `serve` would have started the system with."""
    settings: list[Settings] = []
    monkeypatch.setattr(serve, "serve", settings.append)
    return settings


def test_flags_beat_the_file_which_beats_the_environment_which_beats_the_default(
    in_an_empty_folder: Path, rekindle: Run, served: list[Settings], monkeypatch: pytest.MonkeyPatch
) -> None:
    (in_an_empty_folder / "rekindle.toml").write_text("[serve]\nport = 2\nnum_workers = 2\n")
    for name in ("PORT", "NUM_WORKERS", "MAX_RUNNING"):
        monkeypatch.setenv(f"REKINDLE_{name}", "3")
    rekindle("serve", "--port", "1")
    (settings,) = served
    assert settings.server.port == 1
    assert settings.system.num_workers == 2
    assert settings.worker.max_running == 3
    assert settings.worker.max_waiting == 256


def test_another_file_can_be_named(in_an_empty_folder: Path, rekindle: Run, served: list[Settings]) -> None:
    (in_an_empty_folder / "rekindle.toml").write_text("[serve]\nport = 2\n")
    (in_an_empty_folder / "other.toml").write_text("[serve]\nmodel = 'preset:qwen3-0.6b'\nembedded_redis = true\n")
    rekindle("serve", "--config", "other.toml")
    (settings,) = served
    assert (settings.server.port, settings.worker.model) == (50051, "preset:qwen3-0.6b")
    assert settings.system.embedded_redis


def test_the_file_that_deploy_offers_is_accepted(rekindle: Run, served: list[Settings]) -> None:
    rekindle("serve", "--config", str(Path(cli.__file__).parent.parent / "deploy" / "rekindle.toml"))
    (settings,) = served
    assert settings.worker.redis_url == settings.server.redis_url == "unix:///run/redis/redis.sock"


def test_a_file_that_is_not_there_is_an_error(rekindle: Run, served: list[Settings]) -> None:
    assert "nowhere.toml" in rekindle("serve", "--config", "nowhere.toml", status=2)
    assert not served


def test_an_unknown_name_in_the_file_is_an_error(
    in_an_empty_folder: Path, rekindle: Run, served: list[Settings]
) -> None:
    (in_an_empty_folder / "rekindle.toml").write_text("[serve]\nprot = 2\n")
    assert "prot" in rekindle("serve", status=2)
    assert not served


@pytest.mark.parametrize(("flag", "value"), [("--num-workers", "0"), ("--port", "x"), ("--log-level", "loud")])
def test_a_bad_value_is_one_line_not_a_traceback(rekindle: Run, served: list[Settings], flag: str, value: str) -> None:
    said = rekindle("serve", flag, value, status=2)
    assert flag.strip("-").replace("-", "_") in said.replace("-", "_")
    assert "Traceback" not in said
    assert not served


def test_serve_explains_every_setting_in_groups(rekindle: Run) -> None:
    said = rekindle("serve", "--help")
    for group in ("Front end", "Model", "Memory", "Redis", "Batching", "Workers and Ray"):
        assert f"─ {group} ─" in said
    for flag in ("--model", "--redis-url", "--device-cache-bytes", "--num-workers", "--worker-metrics-port"):
        assert flag in said
    assert "or preset:NAME for a shape with random weights" in said
    assert "[default: redis://127.0.0.1:6379]" in said


@pytest.mark.parametrize(
    "words", [(), ("chat",), ("demo",), ("sessions",), ("sessions", "fork"), ("stats",), ("bench",)], ids=" ".join
)
def test_every_command_has_help(rekindle: Run, words: tuple[str, ...]) -> None:
    assert rekindle(*words, "--help").startswith(" ".join(("Usage: rekindle", *words)))


def test_help_needs_neither_torch_nor_ray_nor_grpc() -> None:
    heavy = "('torch', 'transformers', 'ray', 'grpc', 'google.protobuf', 'numpy')"
    code = (
        "import sys; sys.argv = ['rekindle', 'serve', '--help']; from rekindle.cli import main\n"
        f"try: main()\nfinally: sys.stderr.write(' '.join(m for m in {heavy} if m in sys.modules))"
    )
    root = Path(cli.__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "--model" in done.stdout


def test_a_server_that_is_not_there_ends_the_command_with_one_line(rekindle: Run) -> None:
    said = rekindle("stats", "--target", "127.0.0.1:1", "--timeout-s", "2", status=1)
    assert said.startswith("rekindle: UNAVAILABLE")


@pytest.fixture
def front() -> Iterator[FrontEnd]:
    """A front end on a loop in a thread, so that plain clients can talk to it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    context = front_end()
    yield run(context.__aenter__())
    run(context.__aexit__(None, None, None))
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def answer_of(printed: str) -> Any:
    """The last line is the answer; a front end in this process may have logged before it."""
    return json.loads(printed.splitlines()[-1])


@pytest.fixture
def address(front: FrontEnd, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("REKINDLE_TARGET", front.app.address)
    return front.app.address


def test_sessions_are_listed_shown_forked_parked_warmed_and_removed(rekindle: Run, address: str) -> None:
    with Client(address) as client:
        client.create_session("mine", ttl_s=60)
        client.generate("hello", session_id="mine", max_new_tokens=3).read()
    assert [session["session_id"] for session in answer_of(rekindle("sessions", "ls", "--json"))] == ["mine"]
    assert "60 s" in rekindle("sessions", "ls")
    shown = answer_of(rekindle("sessions", "show", "mine", "--text", "--json"))
    assert (shown["num_tokens"], shown["turns"][0]["reason"]) == (8, "FINISH_REASON_LENGTH")
    assert shown["text"].startswith("<104>")
    assert "1 (to 8)" in rekindle("sessions", "show", "mine")
    forked = answer_of(rekindle("sessions", "fork", "mine", "yours", "--at-turn", "0", "--json"))
    assert (forked["session_id"], forked["num_tokens"], forked["parent_session_id"]) == ("yours", 0, "mine")
    parked = answer_of(rekindle("sessions", "park", "mine", "--drop-host", "--json"))
    assert parked["redis_tokens"] == 8
    assert answer_of(rekindle("sessions", "warm", "mine", "--json"))["device_tokens"] == 8
    assert "tokens" in rekindle("sessions", "rm", "mine")
    assert "NOT_FOUND" in rekindle("sessions", "show", "mine", status=1)


def test_stats_are_a_table_or_one_object(rekindle: Run, address: str) -> None:
    stats = answer_of(rekindle("stats", "--json"))
    assert stats["prompt_tokens"] == {"device": 20, "host": 40, "disk": 0, "redis": 60, "computed": 80}
    assert stats["hit_rate"] == pytest.approx(0.6)
    said = rekindle("stats")
    assert "60.0%" in said
    assert "hit rate" in said


class ConsoleWithCtrlC(Console):
    """The user presses Ctrl-C at the first word of the reply."""

    def out(self, *objects: Any, **options: Any) -> None:
        raise KeyboardInterrupt


def chat(
    address: str, *lines: str, session_id: str = "", console_type: type[Console] = Console, codec: str = ""
) -> tuple[str, str]:
    """Talk by script. Returns what was shown, and the session at the end."""
    shown = io.StringIO()
    script = iter(lines)

    def read_line() -> str:
        line = next(script, None)
        if line is None:
            raise EOFError
        return line

    with Client(address) as client:
        talk = Chat(client, console_type(file=shown, width=200), {"codec": codec}, max_new_tokens=2, seed=None)
        talk.run(session_id, read_line)
    return shown.getvalue(), talk.session_id


def test_chat_streams_replies_and_says_where_the_cache_came_from(address: str) -> None:
    said, session_id = chat(address, "hello", "", "again", "/quit", "never said", session_id="mine")
    assert session_id == "mine"
    assert "turn 1 · prompt of 11 tokens: 11 computed" in said
    assert "turn 2 · prompt of 24 tokens: 13 device + 11 computed" in said
    assert "turn 3" not in said
    said, _ = chat(address, "more", session_id="mine")
    assert "session mine (2 turns, 26 tokens)" in said


def test_chat_forks_parks_and_starts_anew(address: str) -> None:
    said, fork = chat(address, "one", "two", "/park", "/fork 1", "three")
    assert "parked: 22 tokens in Redis" in said
    with Client(address) as client:
        forked = client.get_session(fork)
        assert (forked.parent_turn, len(forked.turns)) == (1, 2)
        said, new = chat(address, "/new", session_id=fork)
        assert new != fork
        assert client.get_session(new).num_tokens == 0


def test_a_conversation_opened_again_in_the_chat_is_restored_ahead_of_what_is_said(address: str) -> None:
    _, session_id = chat(address, "one", "/park", session_id="back")
    chat(address, session_id=session_id)
    give_up = time.monotonic() + 5
    with Client(address) as client:
        while pb.TIER_DEVICE not in [at.tier for at in client.get_session(session_id, with_residency=True).residency]:
            assert time.monotonic() < give_up, "it stayed where it was"
            time.sleep(0.01)


def test_chat_creates_conversations_in_the_codec_that_was_asked_for(rekindle: Run, address: str) -> None:
    for lines, session_id in ((("hello",), ""), (("hello", "/new"), ""), (("hello",), "named")):
        _, session_id = chat(address, *lines, session_id=session_id, codec="k8v4")
        assert answer_of(rekindle("sessions", "show", session_id, "--json"))["codec"] == "k8v4"
    assert "k8v4" in rekindle("sessions", "show", "named")
    assert "codec: must be one of" in rekindle("chat", "--codec", "jpeg", status=1)


def test_chat_goes_on_after_a_mistake(address: str) -> None:
    said, _ = chat(address, "/nonsense", "/fork x", "/fork 9", "/help", "hello")
    assert "/nonsense: there is no such command" in said
    assert "x is not the number of a turn" in said
    assert "at_turn" in said
    assert said.count("start another conversation") == 2
    assert "turn 1" in said


def test_ctrl_c_stops_the_reply_and_not_the_chat(front: FrontEnd, address: str) -> None:
    for worker in front.workers.values():
        worker.pause_s = 0.5
    said, session_id = chat(address, "hello", "/help", console_type=ConsoleWithCtrlC)
    assert "stopped" in said
    assert "start another conversation" in said
    with Client(address) as client:
        assert client.get_session(session_id).num_tokens == 0


@pytest.mark.parametrize(
    ("words", "said"), [(("2", "--ray-address", "127.0.0.1:1"), "refused"), (("0",), "at least 1 worker, got 0")]
)
def test_scaling_what_is_not_there_ends_at_once_with_one_line(words: Sequence[str], said: str) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "rekindle", "scale", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert run.returncode == 1
    assert run.stdout == ""
    assert said in run.stderr
    assert len(run.stderr.splitlines()) == 1
