"""Who is let in: API keys, tokens, and the files that say so; over real gRPC where it is the server that decides."""

import base64
import json
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import jwt
import pytest
import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from grpc_health.v1 import health_pb2, health_pb2_grpc
from structlog.testing import capture_logs

from protos import rekindle_pb2 as pb
from rekindle import cli
from rekindle.client import Client
from rekindle.errors import Denied
from server.api_keys import new_key, parse_keys
from server.config import ConfigError, ServerConfig
from server.errors import Unauthenticated
from server.identity import Caller, Identities
from server.tokens import parse_token_keys
from server.watched_file import WatchedFile
from tests.fake_worker import details_of, front_end

AUDIENCE, ISSUER = "rekindle", "https://issuer.example"
SECRET = b"0123456789abcdef0123456789abcdef"


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def add_key(file: Path, tenant: str, **settings: Any) -> str:
    key, entry = new_key(tenant, **settings)
    with file.open("a") as keys:
        keys.write(entry)
    return key


def bearer(secret: str) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {secret}"),)


def identities(**settings: Any) -> Identities:
    return Identities(ServerConfig(redis_url="memory://", **settings))


def key_id_of(key: str) -> str:
    return key.split("_")[1]


def test_without_keys_and_tokens_anybody_is_the_default_tenant_and_operator() -> None:
    assert identities().identify(()) == Caller("default", operator=True)
    assert identities().identify(bearer("rk_whatever")) == Caller("default", operator=True)


def test_a_key_is_its_tenants(keys_file: Path) -> None:
    acme, other = add_key(keys_file, "acme", name="ci ✓"), add_key(keys_file, "other", operator=True)
    known = identities(api_keys=str(keys_file))
    assert known.identify(bearer(acme)) == Caller("acme", key_id=key_id_of(acme))
    assert known.identify((("authorization", f"bearer {other}"),)) == Caller("other", True, key_id_of(other))
    assert acme not in keys_file.read_text()


def test_all_that_is_wrong_is_refused_alike(keys_file: Path) -> None:
    past = datetime.now(UTC) - timedelta(seconds=1)
    key, expired = add_key(keys_file, "acme"), add_key(keys_file, "acme", expires=past)
    flipped = key[:-1] + ("0" if key[-1] != "0" else "1")
    known = identities(api_keys=str(keys_file))
    shown: list[tuple[tuple[str, str | bytes], ...]] = [
        (),
        bearer(""),
        bearer("rk_"),
        bearer(flipped),
        bearer(expired),
        bearer(new_key("acme")[0]),
        bearer(key + "0"),
        bearer("é" * 84),
        (("authorization", key),),
        (("authorization", f"Basic {key}"),),
        (("authorization", f"Bearer {key}".encode()),),
        bearer(key) * 2,
        bearer("eyJhbGciOiJub25lIn0.e30."),
    ]
    reasons = set()
    for metadata in shown:
        with pytest.raises(Unauthenticated) as refused:
            known.identify(metadata)
        reasons.add(str(refused.value))
    assert reasons == {"a valid API key or token is required"}
    assert known.identify(bearer(key)).tenant == "acme"


def test_a_key_may_expire_later(keys_file: Path) -> None:
    key = add_key(keys_file, "acme", expires=datetime.now(UTC) + timedelta(days=1))
    assert identities(api_keys=str(keys_file)).identify(bearer(key)).tenant == "acme"


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("keys = 1 = 2", "not a TOML file"),
        ("[[key]]", "unknown: key"),
        ("keys = 1", "a list of tables"),
        ("[keys]", "a list of tables"),
        ("tenants = 1", "tables by name"),
        ('[[keys]]\nid = "0011223344556677"', "keys, entry 1: missing"),
        ('[[keys]]\nid = "x"\nsha256 = "y"\ntenant = "t"', "keys, entry 1: id must be"),
        ("{good}colour = 1", "unknown: colour"),
        ("{good}{good}", "entry 2: id 0011223344556677 is there twice"),
        ("{good}expires = 2027-01-31", "entry 1: expires must be"),
        ("{good}operator = 1", "entry 1: operator must be"),
        ("{good}name = 1", "entry 1: name must be"),
        ('[tenants."a b"]\nmax_turns = 1', "must be 1 to 64"),
        ("[tenants.a]\nmax_turns = -1", r"tenants\.a: max_turns must be"),
        ("[tenants.a]\nmax_turns = true", r"tenants\.a: max_turns must be"),
        ("[tenants.a]\nturns = 1", r"tenants\.a: unknown: turns"),
    ],
)
def test_a_keys_file_that_makes_no_sense_says_where_and_quotes_no_hash(content: str, named: str) -> None:
    digest = "ab" * 32
    good = f'[[keys]]\nid = "0011223344556677"\nsha256 = "{digest}"\ntenant = "t"\n'
    with pytest.raises(ConfigError, match=named) as refused:
        parse_keys(content.replace("{good}", good).encode())
    assert digest not in str(refused.value)


def test_a_file_is_read_again_when_it_changes_and_a_change_for_the_worse_is_said_once(tmp_path: Path) -> None:
    file = tmp_path / "number"
    file.write_text("1")

    def parse(content: bytes) -> int:
        if not content.isdigit():
            raise ConfigError("not a number")
        return int(content)

    watched = WatchedFile(str(file), parse, look_s=0.0)
    assert watched.read() == 1
    with capture_logs() as logs:
        file.write_text("22")
        assert watched.read() == 22
        file.write_text("one")
        assert (watched.read(), watched.read()) == (22, 22)
        file.unlink()
        assert watched.read() == 22
        file.write_text("333")
        assert watched.read() == 333
    assert [log["log_level"] for log in logs] == ["info", "error", "error", "info"]
    assert logs[1]["error"] == "not a number"


def test_files_that_cannot_be_used_keep_a_server_from_starting(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="missing"):
        identities(api_keys=str(tmp_path / "missing"))
    (tmp_path / "keys").write_text("nonsense")
    with pytest.raises(ConfigError, match="TOML"):
        identities(api_keys=str(tmp_path / "keys"))
    with pytest.raises(ConfigError, match="JWKS"):
        identities(jwt_keys=str(tmp_path / "keys"), jwt_audience="a", jwt_issuer="i")
    for missing in ("jwt_audience", "jwt_issuer"):
        given: dict[str, Any] = {"jwt_audience": "a", "jwt_issuer": "i"} | {missing: ""}
        with pytest.raises(ConfigError, match=missing):
            ServerConfig(jwt_keys="file", **given)


RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())


def pem(key: Any) -> bytes:
    content: bytes = key.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return content


def jwks(*entries: Mapping[str, Any]) -> bytes:
    return json.dumps({"keys": entries}).encode()


def oct_key(key_id: str, secret: bytes = SECRET) -> dict[str, str]:
    encoded = base64.urlsafe_b64encode(secret).rstrip(b"=").decode()
    return {"kty": "oct", "alg": "HS256", "kid": key_id, "k": encoded}


def token(key: Any, algorithm: str, *, key_id: str = "", **claims: Any) -> str:
    said = {"aud": AUDIENCE, "iss": ISSUER, "exp": time.time() + 60, "tenant": "acme"} | claims
    kept = {name: value for name, value in said.items() if value is not None}
    return jwt.encode(kept, key, algorithm=algorithm, headers={"kid": key_id} if key_id else None)


@pytest.fixture
def believing(tmp_path: Path) -> Callable[..., Identities]:
    def believe(content: bytes, **settings: Any) -> Identities:
        file = tmp_path / "token-keys"
        file.write_bytes(content)
        return identities(jwt_keys=str(file), jwt_audience=AUDIENCE, jwt_issuer=ISSUER, **settings)

    return believe


Believing = Callable[..., Identities]


def is_let_in(known: Identities, secret: str) -> bool:
    try:
        known.identify(bearer(secret))
    except Unauthenticated:
        return False
    return True


@pytest.mark.parametrize(("key", "algorithm"), [(RSA_KEY, "RS256"), (EC_KEY, "ES256")], ids=["RS256", "ES256"])
def test_a_token_signed_with_a_key_in_pem_speaks_for_its_tenant(believing: Believing, key: Any, algorithm: str) -> None:
    known = believing(pem(key))
    assert known.identify(bearer(token(key, algorithm))) == Caller("acme")
    assert known.identify(bearer(token(key, algorithm, key_id="any", aud=["other", AUDIENCE]))) == Caller("acme")


def test_a_jwks_has_keys_by_id_for_all_three_algorithms(believing: Believing) -> None:
    rsa_entry = json.loads(jwt.algorithms.RSAAlgorithm.to_jwk(RSA_KEY.public_key())) | {"kid": "r", "alg": "RS256"}
    ec_entry = json.loads(jwt.algorithms.ECAlgorithm.to_jwk(EC_KEY.public_key())) | {"kid": "e"}
    known = believing(jwks(rsa_entry, ec_entry, oct_key("h")))
    for key, algorithm, key_id in ((RSA_KEY, "RS256", "r"), (EC_KEY, "ES256", "e"), (SECRET, "HS256", "h")):
        assert known.identify(bearer(token(key, algorithm, key_id=key_id))) == Caller("acme")
        assert not is_let_in(known, token(key, algorithm, key_id="x"))
        assert not is_let_in(known, token(key, algorithm))  # which of the three?


def test_the_claim_that_names_the_tenant_can_be_chosen(believing: Believing) -> None:
    known = believing(jwks(oct_key("h")), jwt_tenant_claim="https://rekindle/org")
    assert known.identify(bearer(token(SECRET, "HS256", **{"https://rekindle/org": "o-1"}))) == Caller("o-1")
    assert not is_let_in(known, token(SECRET, "HS256"))


@pytest.mark.parametrize(
    "claims",
    [
        {"exp": 1},
        {"exp": None},
        {"aud": "other"},
        {"aud": None},
        {"iss": "https://other.example"},
        {"iss": None},
        {"tenant": None},
        {"tenant": "a b"},
        {"tenant": 7},
        {"tenant": ""},
        {"nbf": time.time() + 3600},
    ],
    ids=str,
)
def test_a_token_that_lacks_something_is_refused(believing: Believing, claims: dict[str, Any]) -> None:
    known = believing(jwks(oct_key("h")))
    assert is_let_in(known, token(SECRET, "HS256"))
    assert not is_let_in(known, token(SECRET, "HS256", **claims))


def test_a_token_does_not_choose_its_algorithm(believing: Believing) -> None:
    known = believing(pem(RSA_KEY))
    header, claims, _ = token(RSA_KEY, "RS256").split(".")
    assert not is_let_in(known, token(None, "none"))
    assert not is_let_in(known, f"{header}.{claims}.")
    assert not is_let_in(known, token(EC_KEY, "ES256"))
    assert not is_let_in(known, token(SECRET, "HS256"))
    # The public key as the secret, which PyJWT would not sign with.
    signing = base64.urlsafe_b64encode(b'{"alg":"HS256","typ":"JWT"}').rstrip(b"=") + b"." + claims.encode()
    signature = jwt.algorithms.HMACAlgorithm(jwt.algorithms.HMACAlgorithm.SHA256).sign(signing, pem(RSA_KEY))
    forged = signing + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")
    assert not is_let_in(known, forged.decode())


@pytest.mark.parametrize(
    ("content", "named"),
    [
        (b"-----BEGIN PUBLIC KEY-----\nx", "PEM"),
        (b"[]", "JWKS"),
        (b'{"keys": [1]}', "JWKS"),
        (jwks(), "no key"),
        (jwks(oct_key("h", b"short")), "32 bytes"),
        (pem(ec.generate_private_key(ec.SECP384R1())), "P-256"),
    ],
)
def test_token_keys_that_cannot_be_used_are_refused(content: bytes, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse_token_keys(content)


async def test_calls_without_a_key_are_refused_without_reading_them_and_health_stays_open(keys_file: Path) -> None:
    key = add_key(keys_file, "acme")
    async with front_end(api_keys=str(keys_file)) as front:
        for shown in (None, bearer("rk_wrong")):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await front.sessions.CreateSession(pb.CreateSessionRequest(session_id="?"), metadata=shown)
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert [detail.reason for detail in details_of(refused.value)] == ["UNAUTHENTICATED"]
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await front.inference.Generate(pb.GenerateRequest(text="hi"), metadata=shown).read()
            assert refused.value.code() is grpc.StatusCode.UNAUTHENTICATED
        health: Any = health_pb2_grpc.HealthStub(front.channel)
        reply = await health.Check(health_pb2.HealthCheckRequest())
        assert reply.status == health_pb2.HealthCheckResponse.SERVING
        async with Client(front.app.address, api_key=key) as client:
            await client.create_session("s")
            assert await client.generate("hello", session_id="s", max_new_tokens=1).read()
        async with Client(front.app.address, api_key="rk_wrong") as client:
            with pytest.raises(Denied):
                await client.get_session("s")


async def test_the_log_says_whose_a_call_was_and_by_which_key(keys_file: Path) -> None:
    key = add_key(keys_file, "acme")
    async with front_end(api_keys=str(keys_file)) as front, Client(front.app.address, api_key=key) as client:
        with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
            await client.generate("hello", max_new_tokens=1).read()
    assert [(log["tenant"], log["key"]) for log in logs if log["event"] == "turn finished"] == [
        ("acme", key_id_of(key))
    ]


async def test_keys_and_tokens_are_neither_logged_nor_in_errors(keys_file: Path, tmp_path: Path) -> None:
    key, token_keys = add_key(keys_file, "acme"), tmp_path / "jwks"
    token_keys.write_bytes(jwks(oct_key("h")))
    good, bad = token(SECRET, "HS256"), token(SECRET, "HS256", exp=1)
    wrong = key[:-4] + "beef"
    said: list[str] = []
    with capture_logs(processors=[structlog.contextvars.merge_contextvars]) as logs:
        settings: dict[str, Any] = {"jwt_keys": str(token_keys), "jwt_audience": AUDIENCE, "jwt_issuer": ISSUER}
        async with front_end(api_keys=str(keys_file), **settings) as front:
            for secret in (key, wrong, good, bad):
                async with Client(front.app.address, api_key=secret) as client:
                    try:
                        await client.generate("hello", max_new_tokens=1).read()
                        await client.get_session("nobody's")
                    except Exception as error:
                        said.append(f"{error} {error!r}")
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await front.cache.GetCacheStats(pb.GetCacheStatsRequest(), metadata=bearer(wrong))
            said.append(repr(refused.value))
    assert len(said) == 5
    told = "\n".join([*said, *map(str, logs)])
    assert "call refused" in told
    for secret in (key, wrong, good, bad):
        assert secret[-32:] not in told


def test_a_key_is_made_on_the_command_line(keys_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def run(*words: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.make_app().meta(("keys", "new", "--api-keys", str(keys_file), *words))
        assert ended.value.code in (0, None), ended.value.code
        return capsys.readouterr().out.strip()

    keys_file.write_text("[tenants.acme]\nmax_turns = 2")
    keys = [run("--tenant", "acme", "--name", 'it\'s \\ "mine"', "--expires-in-days", "1")]
    keys.append(json.loads(run("--tenant", "other", "--operator", "--json"))["api_key"])
    known = identities(api_keys=str(keys_file))
    assert [known.identify(bearer(key))[:2] for key in keys] == [("acme", False), ("other", True)]
    assert (known.limits("acme").max_turns, known.limits("other").max_turns) == (2, 0)
    with pytest.raises(AssertionError, match="tenant must be"):
        run("--tenant", "a b")


def test_a_new_keys_file_is_for_its_owner_alone(keys_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.make_app().meta(("keys", "new", "--tenant", "t", "--api-keys", str(keys_file)))
    assert keys_file.stat().st_mode & 0o777 == 0o600
