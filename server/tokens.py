"""JSON Web Tokens: whom one speaks for, by keys from a PEM file or a JWKS. The only file that knows PyJWT.

Which algorithm a key is for is the key's to say, never the token's: RS256, ES256, or HS256 (`oct`, in a JWKS only).
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final, NamedTuple

import jwt
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, EllipticCurvePublicKey
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key

from server.config import ConfigError

_ALGORITHMS: Final = ("RS256", "ES256", "HS256")
_LEAST_SECRET_BYTES: Final = 32
_LEEWAY_S: Final = 10.0
"""By how much clocks may differ."""


class TokenKey(NamedTuple):
    id: str | None
    """None: for tokens that name any key, or none."""
    algorithm: str
    key: Any


def parse_token_keys(content: bytes) -> Sequence[TokenKey]:
    """A public key in PEM, or a JWKS. Raises ConfigError, which quotes nothing."""
    return [_pem_key(content)] if content.lstrip().startswith(b"-----") else _jwks(content)


def claims_of(
    token: str, keys: Sequence[TokenKey], *, audience: str, issuer: str, tenant_claim: str
) -> Mapping[str, Any] | None:
    """What the token says, with `tenant_claim` in it; None where it isn't to be believed (now)."""
    try:
        key_id = jwt.get_unverified_header(token).get("kid")
        fitting = [key for key in keys if key.id in (None, key_id)] or (list(keys) if key_id is None else [])
        if len(fitting) != 1:
            return None
        claims: dict[str, Any] = jwt.decode(
            token,
            fitting[0].key,
            algorithms=[fitting[0].algorithm],
            audience=audience,
            issuer=issuer,
            leeway=_LEEWAY_S,
            options={"require": ["exp", "aud", "iss", tenant_claim]},
        )
    except jwt.PyJWTError:
        return None
    return claims


def _pem_key(content: bytes) -> TokenKey:
    try:
        key = load_pem_public_key(content)
    except ValueError as error:
        raise ConfigError("not a public key in PEM") from error
    if isinstance(key, RSAPublicKey):
        return TokenKey(None, "RS256", key)
    if isinstance(key, EllipticCurvePublicKey) and isinstance(key.curve, SECP256R1):
        return TokenKey(None, "ES256", key)
    raise ConfigError("the public key must be RSA, or of the curve P-256")


def _jwks(content: bytes) -> Sequence[TokenKey]:
    try:
        entries = json.loads(content)["keys"]
        parsed = [jwt.PyJWK.from_dict(entry) for entry in entries if entry.get("use", "sig") == "sig"]
    except (ValueError, KeyError, TypeError, AttributeError, jwt.PyJWTError) as error:
        raise ConfigError("neither a public key in PEM nor a JWKS (a JSON object with keys)") from error
    found = [TokenKey(key.key_id, key.algorithm_name, key.key) for key in parsed if key.algorithm_name in _ALGORITHMS]
    if not found:
        raise ConfigError(f"the JWKS has no key for {', '.join(_ALGORITHMS)}")
    if any(key.algorithm == "HS256" and len(key.key) < _LEAST_SECRET_BYTES for key in found):
        raise ConfigError(f"a key for HS256 must have {_LEAST_SECRET_BYTES} bytes at least")
    return found
