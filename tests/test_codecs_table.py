"""What a session may choose, what it may then be given, and what its blocks are written in."""

import pytest

from cache_store.codecs import (
    CODECS,
    EXACT,
    INT8,
    K8V4,
    LADDER,
    LOSSLESS,
    RAW,
    SESSION_CODECS,
    allowed,
    codec_for,
    fidelity_kind,
    fidelity_of,
    find,
    named,
)
from tests.codec_blocks import CPU, layout_of
from worker.tiers.codecs import open_codecs


def test_ids_are_what_is_written_in_everybodys_redis() -> None:
    assert {codec.name: codec.id for codec in CODECS} == {"raw": 0, "lossless": 1, "int8": 2, "k8v4": 3, "int4": 4}


def test_every_codec_can_be_opened_under_its_name() -> None:
    codecs = open_codecs(layout_of(), None, CPU)
    assert [(name, codec.info) for name, codec in codecs.items()] == [(codec.name, codec) for codec in CODECS]


def test_a_frame_of_an_unknown_id_or_version_has_no_codec() -> None:
    assert all(find(codec.id, codec.version) is codec for codec in CODECS)
    assert find(len(CODECS), 1) is None
    assert find(INT8.id, INT8.version + 1) is None


def test_sessions_that_lose_nothing_share_blocks_and_no_others_do() -> None:
    fidelities = {codec: fidelity_of(codec) for codec in SESSION_CODECS}
    assert fidelities.pop("raw") == fidelities.pop("lossless") == EXACT
    assert len(set(fidelities.values())) == len(fidelities)
    assert EXACT not in fidelities.values()


@pytest.mark.parametrize("session_codec", SESSION_CODECS)
@pytest.mark.parametrize("is_full", [True, False])
def test_what_a_session_writes_it_may_read(session_codec: str, is_full: bool) -> None:
    written = codec_for(session_codec, is_full=is_full)
    assert written in allowed(fidelity_of(session_codec))


@pytest.mark.parametrize("session_codec", SESSION_CODECS)
def test_an_unfull_block_is_written_exactly(session_codec: str) -> None:
    assert not codec_for(session_codec, is_full=False, first_rung="int8").lossy


def test_exact_sessions_are_given_exact_codecs_alone_and_a_lossy_one_its_own_besides() -> None:
    assert allowed(EXACT) == {RAW, LOSSLESS}
    assert allowed("k8v4") == {RAW, LOSSLESS, K8V4}
    assert allowed(LADDER) == set(CODECS)


def test_a_ladders_full_blocks_are_written_in_its_first_rung() -> None:
    assert codec_for(LADDER, is_full=True) is LOSSLESS
    assert codec_for(LADDER, is_full=True, first_rung="int8") is INT8


def test_the_frame_says_whose_blocks_may_age() -> None:
    assert [fidelity_kind(fidelity) for fidelity in (EXACT, "int8", "k8v4", "int4", LADDER)] == [0, 1, 1, 1, 2]


@pytest.mark.parametrize("name", ["", "int2", "RAW"])
def test_a_name_there_is_none_of_is_refused_by_name(name: str) -> None:
    for ask in (named, fidelity_of, lambda name: codec_for(name, is_full=True)):
        with pytest.raises(ValueError, match=f"no codec '{name}'"):
            ask(name)
