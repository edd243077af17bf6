"""Sealing: what was sealed comes back to who holds the key and names the place, and nothing else does."""

import secrets
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import capture_logs

from cache_store.errors import InvalidRequest
from cache_store.master_keys import load_keyring, parse_keys
from cache_store.sealing import (
    KEY_BYTES,
    SEAL_BYTES,
    TAG_BYTES,
    Keyring,
    KeyUnknown,
    MasterKey,
    Purpose,
    SealBroken,
    Sealer,
)

OLD, NEW = (MasterKey(name, bytes([number]) * KEY_BYTES) for number, name in enumerate(("old", "new"), start=1))
NAMES = bytes(KEY_BYTES)
SECRET = "ab" * KEY_BYTES


def sealer(*keys: MasterKey, purpose: Purpose = Purpose.BLOCKS) -> Sealer:
    return Keyring(keys or [OLD], names=NAMES).sealer(purpose)


@given(content=st.binary(max_size=300), about=st.binary(max_size=40), tenant=st.text(max_size=10))
def test_what_is_sealed_comes_back_and_shows_nothing_of_itself(content: bytes, about: bytes, tenant: str) -> None:
    value = sealer().sealed(tenant, content, about=about)
    assert len(value) == SEAL_BYTES + len(content) + TAG_BYTES
    assert len(content) < 4 or content not in value
    assert sealer().opened(tenant, value, about=about) == content


@given(content=st.binary(max_size=100), data=st.data())
def test_no_bit_of_a_sealed_value_can_flip(content: bytes, data: st.DataObject) -> None:
    value = bytearray(sealer().sealed("a", content, about=b"here"))
    bit = data.draw(st.integers(0, 8 * len(value) - 1))
    value[bit // 8] ^= 1 << bit % 8
    with pytest.raises((KeyUnknown, SealBroken)):
        sealer().opened("a", bytes(value), about=b"here")


@given(content=st.binary(max_size=60), cut=st.integers(0, 60 + SEAL_BYTES + TAG_BYTES - 1))
def test_a_value_cut_short_or_longer_is_broken(content: bytes, cut: int) -> None:
    value = sealer().sealed("a", content, about=b"here")
    for wrong in (value[: min(cut, len(value) - 1)], value + b"\0" * (cut + 1)):
        with pytest.raises(SealBroken):
            sealer().opened("a", wrong, about=b"here")


@given(about=st.binary(max_size=20), other=st.binary(max_size=20))
def test_a_value_opens_in_its_own_place_only(about: bytes, other: bytes) -> None:
    value = sealer().sealed("a", b"content", about=about)
    if other != about:
        with pytest.raises(SealBroken):
            sealer().opened("a", value, about=other)


def test_a_value_opens_for_its_own_tenant_and_purpose_only() -> None:
    value = sealer().sealed("a", b"content", about=b"")
    with pytest.raises(KeyUnknown, match="another tenant"):
        sealer().opened("b", value, about=b"")
    with pytest.raises(SealBroken):
        sealer(purpose=Purpose.RECORDS).opened("a", value, about=b"")


def test_two_values_of_one_content_share_no_nonce_and_no_ciphertext() -> None:
    values = [sealer().sealed("a", bytes(64), about=b"") for _ in range(100)]
    assert len({value[SEAL_BYTES - 12 : SEAL_BYTES] for value in values}) == 100
    assert len({value[SEAL_BYTES:] for value in values}) == 100


def test_the_first_key_seals_and_all_open() -> None:
    value = sealer(OLD).sealed("a", b"content", about=b"")
    both = sealer(NEW, OLD)
    assert both.opened("a", value, about=b"") == b"content"
    assert not both.is_current(value)
    renewed = both.sealed("a", b"content", about=b"")
    assert both.is_current(renewed)
    assert sealer(NEW).opened("a", renewed, about=b"") == b"content"
    with pytest.raises(KeyUnknown, match="'new'"):
        sealer(OLD).opened("a", renewed, about=b"")


def test_another_key_of_the_same_id_opens_nothing() -> None:
    value = sealer(OLD).sealed("a", b"content", about=b"")
    with pytest.raises(KeyUnknown, match="old"):
        sealer(MasterKey("old", bytes(KEY_BYTES))).opened("a", value, about=b"")


def test_sealing_like_another_value_is_for_its_tenant_under_its_key() -> None:
    both = sealer(NEW, OLD)
    old = sealer(OLD).sealed("a", b"content", about=b"")
    into = bytearray(3 + TAG_BYTES)
    seal = both.seal_like(old[:SEAL_BYTES], b"new", memoryview(into), about=b"there")
    assert sealer(OLD).opened("a", seal + into, about=b"there") == b"new"


@given(pieces=st.lists(st.binary(max_size=70), max_size=8))
def test_a_value_is_opened_in_pieces_of_any_length(pieces: list[bytes]) -> None:
    content = b"".join(pieces)
    value = bytearray(sealer().sealed("a", content, about=b"x"))
    opening = sealer().opening(bytes(value[:SEAL_BYTES]), tenant=None, about=b"x")
    at = SEAL_BYTES
    for piece in pieces:
        opening.open(memoryview(value)[at : at + len(piece)])
        at += len(piece)
    opening.finish(bytes(value[at:]))
    assert value[SEAL_BYTES:at] == content


def test_names_of_blocks_depend_on_the_secret_and_on_no_key_that_seals() -> None:
    ring = Keyring([OLD], names=NAMES)
    assert ring.blinded(b"model") == Keyring([NEW, OLD], names=NAMES).blinded(b"model") != b"model"
    assert ring.blinded(b"model") != Keyring([OLD], names=b"\1" * KEY_BYTES).blinded(b"model")
    assert ring.blinded(b"model") != ring.blinded(b"other model")


ENTRIES = f"2026:{SECRET}\nnames:{'cd' * KEY_BYTES}\n2025:{'ef' * KEY_BYTES}\n"


def test_keys_come_from_a_file_the_environment_or_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "master keys"
    path.write_text(ENTRIES)
    monkeypatch.setenv("MASTER_KEYS", ENTRIES.replace("\n", " "))
    for source in (f"file:{path}", "env:MASTER_KEYS", f"command:cat '{path}'"):
        ring = load_keyring(source)
        assert ring is not None
        assert ring.first == "2026"
        assert repr(ring) == "Keyring(2026, 2025)"
        assert not ring.takes_plain
    assert load_keyring("") is None
    assert parse_keys(f"{ENTRIES} plain").takes_plain


@pytest.mark.parametrize(("mode", "warned"), [(0o600, False), (0o400, False), (0o640, True), (0o604, True)])
def test_master_keys_that_other_users_may_read_are_warned_of(tmp_path: Path, mode: int, warned: bool) -> None:
    path = tmp_path / "keys"
    path.write_text(ENTRIES)
    path.chmod(mode)
    with capture_logs() as logs:
        load_keyring(f"file:{path}")
    assert [(log["log_level"], log["path"]) for log in logs] == ([("warning", str(path))] if warned else [])
    assert SECRET not in str(logs)


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ("", "needs an entry"),
        (f"1:{SECRET}", "names"),
        (f"names:{SECRET}", "that seals"),
        (f"1:{SECRET} names:{SECRET} 1:{SECRET}", "entry 3"),
        (f"1:{SECRET} names:{SECRET} names:{SECRET}", "entry 3"),
        (f"{SECRET}:1", "entry 1"),
        (f"1:{SECRET}00 names:{SECRET}", "entry 1"),
        (f"1:{SECRET} names:{SECRET[1:]}", "entry 2"),
        (f"a key:{SECRET}", "entry 1"),
        (f"seventeen-letters:{SECRET}", "entry 1"),
    ],
)
def test_keys_that_are_none_are_refused_and_not_shown(entries: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=f"master_keys: .*{problem}") as refused:
        parse_keys(entries)
    assert SECRET[1:] not in f"{refused.value}{refused.value.__cause__}"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("file:/nowhere/keys", "can't be read"),
        ("env:NOT_THERE_AT_ALL", "NOT_THERE_AT_ALL is not in the environment"),
        ("command:false", "ended with status 1"),
        ("command:/nowhere/kms", "can't be run"),
        ("command:'", "can't be run"),
        ("command:printf \\377", "entry 1"),
        (SECRET, "must be file:PATH, env:NAME or command:COMMAND"),
    ],
)
def test_a_source_that_gives_no_keys_is_refused_and_says_why(source: str, problem: str) -> None:
    with pytest.raises(InvalidRequest, match=problem) as refused:
        load_keyring(source)
    assert SECRET not in str(refused.value)


def test_nothing_that_holds_a_secret_shows_it_when_printed() -> None:
    secret = secrets.token_bytes(KEY_BYTES)
    key = MasterKey("id", secret)
    ring = Keyring([key], names=secret)
    shown = f"{key!r} {ring!r} {ring.sealer(Purpose.BLOCKS)!r}"
    assert secret.hex() not in shown
    assert repr(secret)[2:10] not in shown
