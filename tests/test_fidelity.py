"""The proof that a restored conversation is the same one: what is counted, what fails, and a whole run of it."""

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.fidelity import evaluate
from benchmarks.fidelity_arms import Arm, Parking, Reply, Stored
from benchmarks.fidelity_figures import CodecFigures, accuracy, agreement, bars, drift, drift_by_resumes, judge
from models.dialogues import Act, Dialogue, Turn, held_out
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


def arms_of(codec: str, *, mean_kl: float = 0.0, mean_kl_once: float = 0.0) -> dict[Parking, Arm]:
    """One dialogue, held in all ways; all replies are equal, and right."""
    said = [(turn.reply, (number, 7)) for number, turn in enumerate(TALK.turns)]
    plain = [reply(*tokens, text=text) for text, tokens in said]
    resumed = [
        reply(*tokens, text=text, resumes=number, audit=audited(mean_kl) if number else None)
        for number, (text, tokens) in enumerate(said)
    ]
    last = replace(resumed[-1], receipt=pb.Receipt(redis_tokens=64, audit=audited(mean_kl_once)))
    return {
        Parking.NEVER: arm("raw", Parking.NEVER, *plain),
        Parking.EVERY_TURN: arm(codec, Parking.EVERY_TURN, *resumed),
        Parking.ONCE: arm(codec, Parking.ONCE, *plain[:-1], last),
        Parking.OFTEN: arm(codec, Parking.OFTEN, *plain[:-1], last),
    }


def judged(arms: dict[Parking, Arm], *, raw: Arm | None = None) -> CodecFigures:
    rest: dict[Parking, Arm] = {parking: arm for parking, arm in arms.items() if parking is not Parking.NEVER}
    return judge([TALK], arms[Parking.NEVER], rest, raw)


def failing(arms: dict[Parking, Arm], *, on_recall: bool = True) -> list[str]:
    """What does not hold."""
    return [bar.name.partition(": ")[2] for bar in bars(judged(arms), on_recall=on_recall) if not bar.holds]


def change(arms: dict[Parking, Arm], parking: Parking, number: int, **changes: Any) -> None:
    """Change one reply of an arm."""
    (replies,) = arms[parking].conversations
    changed = replace(replies[number], **changes)
    arms[parking] = replace(arms[parking], conversations=((*replies[:number], changed, *replies[number + 1 :]),))


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
    assert failing(arms_of(codec)) == []


@pytest.mark.parametrize(("codec", "failed"), [("lossless", ["share of replies equal"]), ("k8v4", [])])
def test_an_exact_codec_may_change_no_token_and_a_lossy_one_may(codec: str, failed: list[str]) -> None:
    arms = arms_of(codec)
    change(arms, Parking.EVERY_TURN, 0, token_ids=(0, 8))
    assert failing(arms, on_recall=False) == failed


def test_int8_may_change_no_answer_and_hardly_a_token() -> None:
    arms = arms_of("int8")
    change(arms, Parking.EVERY_TURN, 1, token_ids=(1, 8), text="Let me see: your cat is Tim.")
    assert failing(arms) == ["points of accuracy lost", "share of tokens equal"]


def test_a_ratio_is_asked_of_the_recall_model_alone() -> None:
    assert failing(arms_of("int4")) == ["times smaller"]
    assert failing(arms_of("int4"), on_recall=False) == []


def test_the_last_turns_drift_is_told_for_sessions_resumed_in_every_turn_and_once() -> None:
    figures = judged(arms_of("int8", mean_kl=0.05, mean_kl_once=0.01))
    assert (figures.last_turn.mean_kl, figures.last_turn_resumed_once.mean_kl) == pytest.approx((0.05, 0.01))
    assert (figures.drift.turns, figures.resumed_turns) == (2, 4)


def test_a_session_resumed_often_may_differ_in_no_bit_from_one_resumed_once() -> None:
    arms = arms_of("int4")
    change(arms, Parking.OFTEN, 2, logprobs=(-1.0, -1.0000001))
    assert failing(arms, on_recall=False) == ["same bits in the last turn, resumed often or once"]


@pytest.mark.parametrize(
    ("receipt", "missing"),
    [
        (pb.Receipt(redis_tokens=64, audit=audited(0.0, passed=False)), "audits failed"),
        (pb.Receipt(redis_tokens=64), "resumed turns without an audit"),
        (pb.Receipt(redis_tokens=48, host_tokens=16, audit=audited(0.0)), "resumed turns not from Redis alone"),
        (pb.Receipt(redis_tokens=48, computed_tokens=16, audit=audited(0.0)), "resumed turns not from Redis alone"),
    ],
)
@pytest.mark.parametrize("parking", [Parking.EVERY_TURN, Parking.ONCE, Parking.OFTEN])
def test_a_resume_that_was_none_or_failed_its_audit_proves_nothing(
    parking: Parking, receipt: pb.Receipt, missing: str
) -> None:
    arms = arms_of("raw")
    change(arms, parking, 2, receipt=receipt)
    assert failing(arms) == [missing]


def test_a_run_without_a_full_block_proves_nothing() -> None:
    arms = arms_of("raw")
    arms[Parking.EVERY_TURN] = replace(arms[Parking.EVERY_TURN], stored=Stored())
    assert failing(arms) == ["full blocks in Redis"]


def test_speed_is_told_in_bytes_as_the_device_has_them() -> None:
    labels = '{codec="int8",source="device",target="host"}'
    metrics = {f"rekindle_moved_raw_bytes_total{labels}": 3e9, f"rekindle_moved_seconds_total{labels}": 2.0}
    arms = arms_of("int8")
    arms[Parking.EVERY_TURN] = replace(arms[Parking.EVERY_TURN], metrics=metrics)
    assert (judged(arms).encode_gb_s, judged(arms).decode_gb_s) == (1.5, 0.0)


def test_exact_codecs_are_held_to_each_others_last_bit() -> None:
    raw = arms_of("raw")
    assert judged(arms_of("lossless"), raw=raw[Parking.EVERY_TURN]).same_bits_as_raw == 1
    change(raw, Parking.EVERY_TURN, 2, logprobs=(-1.0, -1.0000001))
    figures = judged(arms_of("lossless"), raw=raw[Parking.EVERY_TURN])
    assert figures.same_bits_as_raw == pytest.approx(2 / 3)
    assert [bar.name for bar in bars(figures, on_recall=False) if not bar.holds] == [
        "lossless: same bits in every turn as raw"
    ]


def test_a_session_is_parked_as_often_as_its_arm_says() -> None:
    times = {parking: [parking.times(turn, 3) for turn in range(4)] for parking in Parking}
    assert times == {
        Parking.NEVER: [0, 0, 0, 0],
        Parking.EVERY_TURN: [0, 1, 1, 1],
        Parking.ONCE: [0, 0, 0, 1],
        Parking.OFTEN: [0, 0, 0, 3],
    }
    assert not any(parking.times(0, 0) for parking in Parking)


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
    words = ("--model", "preset:tiny", "--dialogues", "2", "--max-tokens", "240", "--max-new-tokens", "12")
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
    lengths = [len(dialogue.turns) for dialogue in held_out(2, seed=0, max_tokens=240)]
    assert raw["drift"]["turns"] == sum(lengths) - 2 > 4
    assert raw["resumed_turns"] == raw["drift"]["turns"] + 2 * sum(length > 1 for length in lengths)
    assert all(codec["encode_gb_s"] > 0 and codec["decode_gb_s"] > 0 for codec in (raw, lossless, int8))
