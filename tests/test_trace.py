"""Traces of requests: the formats, conversations recognised in them, prompts made of ids, and a made-up load."""

import gzip
import json
import statistics
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import pytest

from benchmarks.trace import Piece, Request, TokenSource, TraceError, chosen, read_trace, scaled
from benchmarks.trace_generate import KINDS, generated


def mooncake(at_ms: int, input_length: int, ids: list[int], output_length: int = 5) -> dict[str, object]:
    return {"timestamp": at_ms, "input_length": input_length, "output_length": output_length, "hash_ids": ids}


def written(folder: Path, *rows: dict[str, object]) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    return path


def conversations(requests: list[Request]) -> list[tuple[int, int]]:
    return [(request.conversation, request.turn) for request in requests]


def prefix_of(one: list[int], other: list[int]) -> int:
    return next((at for at, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(one))


def test_the_bundled_trace_is_all_there() -> None:
    trace = read_trace()
    assert (len(trace), trace[-1].at_s) == (3993, 1022.025)
    assert sum(len(request.pieces) for request in trace) == 121_877
    assert (trace[0].prompt_tokens, trace[0].output_tokens) == (40160, 6)
    turns = Counter(request.turn for request in trace)
    assert (turns[1], turns[2], max(turns)) == (2212, 423, 18)


def test_mooncakes_lines_give_times_pieces_and_turns(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        mooncake(1500, 1100, [1, 2, 3]),
        mooncake(500, 700, [8, 9], output_length=0),
        mooncake(2500, 1600, [1, 2, 4, 5]),
        mooncake(3500, 1700, [1, 2, 4, 6]),
        mooncake(4500, 513, [1, 7]),
    )
    trace = read_trace(path)
    assert [request.at_s for request in trace] == [0.5, 1.5, 2.5, 3.5, 4.5]
    assert trace[1].pieces == (Piece(1, 512), Piece(2, 512), Piece(3, 76))
    assert [request.output_tokens for request in trace] == [1, 5, 5, 5, 5]
    assert conversations(trace) == [(0, 1), (1, 1), (1, 2), (1, 3), (4, 1)]  # the last shares a quarter of what was


def test_a_system_prompt_makes_no_conversation(tmp_path: Path) -> None:
    path = written(tmp_path, *(mooncake(number, 600, [0, number]) for number in range(1, 100)))
    assert {request.turn for request in read_trace(path)} == {1}


def test_bailians_lines_say_themselves_which_turn_they_are(tmp_path: Path) -> None:
    def bailian(chat: int, parent: int, turn: int, input_length: int, ids: list[int]) -> dict[str, object]:
        of_chat = {"chat_id": chat, "parent_chat_id": parent, "turn": turn, "type": "text"}
        return of_chat | mooncake(chat, input_length, ids) | {"timestamp": chat / 2}

    path = written(
        tmp_path,
        bailian(3, -1, 1, 20, [10, 11]),
        bailian(4, 2, 6, 16, [20]),
        bailian(5, 3, 2, 40, [10, 12, 13]),
        bailian(7, 5, 3, 41, [10, 12, 14]),
    )
    trace = read_trace(path)
    assert conversations(trace) == [(3, 1), (4, 6), (3, 2), (3, 3)]
    assert trace[0].pieces == (Piece(10, 16), Piece(11, 4))
    assert trace[2].at_s == 2.5


def test_a_packed_trace_is_unpacked(tmp_path: Path) -> None:
    plain = written(tmp_path, mooncake(0, 512, [1]))
    packed = tmp_path / "trace.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read_trace(packed) == read_trace(plain)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "no json",
        '{"timestamp": 1}',
        '{"timestamp": "1", "input_length": 5, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 1, "input_length": 513, "output_length": 1, "hash_ids": [1]}',
        '{"timestamp": 1, "input_length": 512, "output_length": 1, "hash_ids": [1, 2]}',
        '{"timestamp": 1, "input_length": 0, "output_length": 1, "hash_ids": []}',
        "7",
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(text)
    with pytest.raises(TraceError):
        read_trace(path)


def test_a_choice_is_of_whole_conversations_and_is_the_seeds() -> None:
    trace = read_trace()
    sizes = Counter(request.conversation for request in trace)
    some = chosen(trace, at_most=100, seed=1)
    assert 95 <= len(some) <= 100
    assert Counter(request.conversation for request in some).items() <= sizes.items()
    assert [request.at_s for request in some] == sorted(request.at_s for request in some)
    assert some == chosen(trace, at_most=100, seed=1) != chosen(trace, at_most=100, seed=2)
    assert chosen(trace, at_most=len(trace), seed=1) == trace


def test_prompts_share_what_their_ids_share_at_any_scale() -> None:
    some = chosen(read_trace(), at_most=60, seed=0)
    tokens = TokenSource(32_000)
    for scale in (512.0, 100.0, 32.0):
        smaller = scaled(some, scale)
        each = -int(-512 // scale)
        for one, other in pairwise(smaller):
            shared = prefix_of([piece.id for piece in one.pieces], [piece.id for piece in other.pieces])
            expected = sum(piece.num_tokens for piece in one.pieces[:shared])
            assert prefix_of(tokens.prompt(one), tokens.prompt(other)) == pytest.approx(expected, abs=1)
            assert {piece.num_tokens for piece in one.pieces[:-1]} <= {each}


def test_a_shorter_piece_of_an_id_is_a_longer_ones_beginning() -> None:
    def prompt(num_tokens: int) -> list[int]:
        piece = Piece(1 << 60, num_tokens)
        return TokenSource(1000).prompt(Request(at_s=0, pieces=(piece,), output_tokens=1, conversation=0, turn=1))

    assert prompt(500)[:123] == prompt(123)
    assert set(prompt(500)) <= set(range(1000))
    assert len(set(prompt(500))) > 300


@pytest.mark.parametrize("scale", [0.5, 513.0])
def test_a_scale_that_leaves_nothing_is_refused(scale: float) -> None:
    with pytest.raises(TraceError, match="scale must be"):
        scaled(read_trace()[:3], scale)


def test_made_up_conversations_go_on_from_their_own_beginnings() -> None:
    load = generated("chat", requests=2000, gap_s=8.0, seed=1)
    assert len(load) == 2000
    assert [request.at_s for request in load] == sorted(request.at_s for request in load)
    turns = defaultdict(list)
    for request in load:
        turns[request.conversation].append(request)
    for conversation in turns.values():
        assert [request.turn for request in conversation] == list(range(1, len(conversation) + 1))
        for before, after in pairwise(conversation):
            said = len(before.pieces)
            assert after.pieces[:said] == before.pieces
            assert after.pieces[said].num_tokens == before.output_tokens
            assert len(after.pieces) == said + 2
    firsts = [request.pieces for conversation in turns.values() for request in conversation if request.turn == 1]
    assert len({pieces[0] for pieces in firsts}) == 8
    assert all(500 <= pieces[0].num_tokens <= 2000 for pieces in firsts)
    assert statistics.median(pieces[1].num_tokens for pieces in firsts) == pytest.approx(600, rel=0.2)
    assert statistics.mean(request.output_tokens for request in load) == pytest.approx(343, rel=0.1)


def test_agents_think_for_seconds_and_people_for_minutes() -> None:
    def median_think_s(kind: str) -> float:
        times = defaultdict(list)
        for request in generated(kind, requests=3000, gap_s=8.0, seed=2):
            times[request.conversation].append(request.at_s)
        return statistics.median(after - before for all_s in times.values() for before, after in pairwise(all_s))

    assert median_think_s("agents") == pytest.approx(1.5, rel=0.2)
    assert 60 < median_think_s("long") < 300


def test_loads_are_the_seeds_and_their_kinds_are_known_by_name() -> None:
    for kind in KINDS:
        assert generated(kind, requests=50, gap_s=8.0, seed=3) == generated(kind, requests=50, gap_s=8.0, seed=3)
    with pytest.raises(TraceError, match="there are chat, long, agents"):
        generated("dreams", requests=50, gap_s=8.0, seed=3)
