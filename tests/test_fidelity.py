"""The proof that a restored conversation is the same one: what is counted, what fails, and a whole run of it."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.fidelity import evaluate
from benchmarks.fidelity_arms import Arm, Parking, Reply, Stored
from benchmarks.fidelity_figures import accuracy, agreement, bars, drift, drift_by_resumes, judge
from models.dialogues import Act, Dialogue, Turn
from protos import rekindle_pb2 as pb
from tests.processes import command, processes_of

TALK = Dialogue(
    (
        Turn("My cat is Tom.", "Noted: your cat is Tom.", Act.TELL),
        Turn("My cat?", "Let me see: your cat is Tom.", Act.ASK, answer="Tom"),
        Turn("My dog?", "Let me see: your dog? I don't know, you haven't told me.", Act.ASK_UNKNOWN),
    )
)


def audited(mean_kl: float, *, tokens: int = 4, passed: bool = True) -> pb.Audit:
    return pb.Audit(
        tokens=tokens, agreeing_tokens=tokens, mean_kl=mean_kl, max_kl=2 * mean_kl, nll_drift=-mean_kl, passed=passed
    )


def reply(*token_ids: int, text: str = "", resumes: int = 0, audit: pb.Audit | None = None) -> Reply:
    """A reply, with log-probability -1 for each token; a resumed one took its 64 tokens from Redis."""
    receipt = pb.Receipt(redis_tokens=64 if resumes else 0, audit=audit)
    return Reply(text, token_ids, (-1.0,) * len(token_ids), receipt, resumes, 64 if resumes else None)


def arm(codec: str, parking: Parking, *replies: Reply) -> Arm:
    stored = Stored(2, 4096, 2048 if codec == "int8" else 3072, 5000, 4000)
    return Arm(codec, parking, (replies,), stored, {})


def three_arms(codec: str, *, mean_kl: float = 0.0, mean_kl_once: float = 0.0) -> tuple[Arm, Arm, Arm]:
    """One dialogue undisturbed, resumed before every turn, and resumed once; all replies are equal, and right."""
    said = [(turn.reply, (number, 7)) for number, turn in enumerate(TALK.turns)]
    plain = [reply(*tokens, text=text) for text, tokens in said]
    resumed = [
        reply(*tokens, text=text, resumes=number, audit=audited(mean_kl) if number else None)
        for number, (text, tokens) in enumerate(said)
    ]
    once = [
        *plain[:-1],
        replace(resumed[-1], resumes=1, receipt=pb.Receipt(redis_tokens=64, audit=audited(mean_kl_once))),
    ]
    return (
        arm("raw", Parking.NEVER, *plain),
        arm(codec, Parking.EVERY_TURN, *resumed),
        arm(codec, Parking.BEFORE_LAST, *once),
    )


def failing(undisturbed: Arm, every_turn: Arm, once: Arm, *, on_recall: bool = True) -> list[str]:
    """What does not hold."""
    figures = judge([TALK], undisturbed, every_turn, once, None)
    return [bar.name.partition(": ")[2] for bar in bars(figures, on_recall=on_recall) if not bar.holds]


def with_reply(arm: Arm, number: int, changed: Reply) -> Arm:
    (replies,) = arm.conversations
    return replace(arm, conversations=((*replies[:number], changed, *replies[number + 1 :]),))


def test_replies_agree_position_by_position_and_what_is_too_long_disagrees() -> None:
    found = agreement([reply(1, 2, 3), reply(4, 5)], [reply(1, 9, 3), reply(4, 5, 6)])
    assert found.tokens == pytest.approx(4 / 6)
    assert found.replies == 0
    found = agreement([reply(1, 2), reply(3)], [reply(1, 2), reply(4)])
    assert (found.tokens, found.replies) == pytest.approx((2 / 3, 0.5))


def test_log_probabilities_are_compared_up_to_the_first_different_token() -> None:
    ours = replace(reply(1, 2, 3), logprobs=(-1.0, -1.5, -9.0))
    assert agreement([ours], [reply(1, 2, 4)]).max_logprob_change == 0.5


def test_only_questions_are_judged_exact_and_not_knowing_is_an_answer() -> None:
    answers = [reply(text=text) for text in ("wrong", TALK.turns[1].reply, "your dog is Rex.")]
    assert accuracy([TALK], [answers]) == 0.5


def test_audits_weigh_as_many_tokens_as_they_have() -> None:
    found = drift([reply(audit=audited(0.1, tokens=1)), reply(), reply(audit=audited(0.4, tokens=2, passed=False))])
    assert (found.turns, found.failed, found.tokens, found.agreeing_tokens) == (2, 1, 3, 3)
    assert (found.mean_kl, found.max_kl, found.nll_drift) == pytest.approx((0.3, 0.8, -0.3))
    assert drift([]).mean_kl == 0


def test_drift_is_told_by_how_often_a_session_was_resumed() -> None:
    replies = [reply(resumes=resumes, audit=audited(resumes / 10) if resumes else None) for resumes in range(6)]
    found = drift_by_resumes(replies)
    assert {resumes: (one.turns, round(one.max_kl, 3)) for resumes, one in found.items()} == {
        "1": (1, 0.2),
        "2-3": (2, 0.6),
        "4-7": (2, 1.0),
    }


@pytest.mark.parametrize("codec", ["raw", "lossless", "int8"])
def test_a_codec_that_keeps_its_promises_fails_in_nothing(codec: str) -> None:
    assert failing(*three_arms(codec)) == []


def test_an_exact_codec_may_change_no_token_and_a_lossy_one_may() -> None:
    for codec in ("lossless", "k8v4"):
        undisturbed, every_turn, once = three_arms(codec)
        other = replace(every_turn.conversations[0][0], token_ids=(0, 8))
        found = failing(undisturbed, with_reply(every_turn, 0, other), once, on_recall=False)
        assert found == (["share of replies equal"] if codec == "lossless" else [])


def test_int8_may_change_no_answer_and_hardly_a_token() -> None:
    undisturbed, every_turn, once = three_arms("int8")
    other = replace(every_turn.conversations[0][1], token_ids=(1, 8), text="Let me see: your cat is Tim.")
    found = failing(undisturbed, with_reply(every_turn, 1, other), once)
    assert found == ["points of accuracy lost", "share of tokens equal"]


def test_a_ratio_is_asked_of_the_recall_model_alone() -> None:
    undisturbed, every_turn, once = three_arms("int4")
    assert failing(undisturbed, every_turn, once) == ["times smaller"]
    assert failing(undisturbed, every_turn, once, on_recall=False) == []


def test_drift_that_grows_with_resumes_fails_unless_it_is_rounding() -> None:
    assert failing(*three_arms("int8", mean_kl=0.05, mean_kl_once=0.01)) == [
        "KL of the last turn, resumed every turn over resumed once"
    ]
    assert failing(*three_arms("int8", mean_kl=0.05, mean_kl_once=0.04)) == []
    assert failing(*three_arms("raw", mean_kl=5e-4, mean_kl_once=1e-6)) == []


@pytest.mark.parametrize(
    ("receipt", "missing"),
    [
        (pb.Receipt(redis_tokens=64, audit=audited(0.1, passed=False)), "audits failed"),
        (pb.Receipt(redis_tokens=64), "resumed turns without an audit"),
        (pb.Receipt(redis_tokens=48, host_tokens=16, audit=audited(0.0)), "resumed turns not from Redis alone"),
        (pb.Receipt(redis_tokens=48, computed_tokens=16, audit=audited(0.0)), "resumed turns not from Redis alone"),
    ],
)
def test_a_resume_that_was_none_or_failed_its_audit_proves_nothing(receipt: pb.Receipt, missing: str) -> None:
    undisturbed, every_turn, once = three_arms("raw")
    resumed = replace(every_turn.conversations[0][1], receipt=receipt)
    assert failing(undisturbed, with_reply(every_turn, 1, resumed), once) == [missing]


def test_speed_is_told_in_bytes_as_the_device_has_them() -> None:
    undisturbed, every_turn, once = three_arms("int8")
    labels = '{codec="int8",source="device",target="host"}'
    metrics = {f"rekindle_moved_raw_bytes_total{labels}": 3e9, f"rekindle_moved_seconds_total{labels}": 2.0}
    figures = judge([TALK], undisturbed, replace(every_turn, metrics=metrics), once, None)
    assert (figures.encode_gb_s, figures.decode_gb_s) == (1.5, 0.0)


def test_a_run_without_a_full_block_proves_nothing() -> None:
    undisturbed, every_turn, once = three_arms("raw")
    assert failing(undisturbed, replace(every_turn, stored=Stored()), once) == ["full blocks in Redis"]


def test_exact_codecs_are_held_to_each_others_last_bit() -> None:
    undisturbed, every_turn, once = three_arms("lossless")
    raw = three_arms("raw")[1]
    assert judge([TALK], undisturbed, every_turn, once, raw).same_bits_as_raw == 1
    nearly = replace(raw.conversations[0][2], logprobs=(-1.0, -1.0000001))
    figures = judge([TALK], undisturbed, every_turn, once, with_reply(raw, 2, nearly))
    assert figures.same_bits_as_raw == pytest.approx(2 / 3)
    assert [bar.name for bar in bars(figures, on_recall=False) if not bar.holds] == [
        "lossless: share of replies with raw's log-probabilities"
    ]


def test_a_codec_that_there_is_none_of_ends_the_command_with_one_line() -> None:
    with pytest.raises(SystemExit, match="rekindle: there is no codec 'int9'"):
        evaluate(model="preset:tiny", codec=["int9"])


def test_what_can_be_evaluated_is_told_without_loading_it() -> None:
    code = (
        "import sys; sys.argv = ['rekindle', 'eval', '--help']; from rekindle.cli import main\n"
        "try: main()\nfinally: sys.stderr.write(' '.join(m for m in ('torch', 'grpc', 'models') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    assert "fidelity" in done.stdout


@pytest.mark.slow
def test_an_evaluation_that_is_stopped_leaves_nothing_behind(tmp_path: Path) -> None:
    with command(tmp_path, "eval", "fidelity", "--model", "preset:tiny", "--codec", "raw") as process:
        give_up = time.monotonic() + 60
        while len(processes_of(tmp_path)) < 2:  # until there is a Redis, too
            assert process.poll() is None, (tmp_path / "stderr").read_text()
            assert time.monotonic() < give_up
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130, (tmp_path / "stderr").read_text()


@pytest.mark.slow
def test_whole_dialogues_come_back_from_redis_as_they_were(tmp_path: Path) -> None:
    words = ("--model", "preset:tiny", "--dialogues", "2", "--max-tokens", "160", "--max-new-tokens", "12")
    blocks = ("--block-tokens", "16", "--cache-bytes", str(16 << 20), "--codec", "raw", "lossless", "int8", "--json")
    with command(tmp_path, "eval", "fidelity", *words, *blocks) as process:
        said, _ = process.communicate(timeout=100)
    errors = (tmp_path / "stderr").read_text()
    assert process.returncode == 0, (said, errors)
    shown = json.loads(said)
    assert shown["benchmark"] == "fidelity"
    assert all(bar["holds"] for bar in shown["bars"])
    raw, lossless, int8 = shown["figures"]["codecs"]
    assert [codec["codec"] for codec in (raw, lossless, int8)] == ["raw", "lossless", "int8"]
    assert raw["ratio"] == 1 < lossless["ratio"] < 2 < int8["ratio"]
    assert lossless["same_bits_as_raw"] == 1
    assert raw["drift"]["mean_kl"] < 1e-6 < int8["drift"]["mean_kl"]
    assert raw["resumed_turns"] == raw["drift"]["turns"] + 2 > 4
    assert all(codec["encode_gb_s"] > 0 and codec["decode_gb_s"] > 0 for codec in (raw, lossless, int8))
