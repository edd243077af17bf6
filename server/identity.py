"""Who calls. The one place that decides it: tenants name sessions and salt block hashes."""

from collections.abc import Iterable
from contextvars import ContextVar
from typing import Final, NamedTuple

from server.api_keys import KeyRing, parse_keys
from server.config import ServerConfig
from server.errors import Unauthenticated
from server.tenants import DEFAULT_TENANT, TenantLimits, is_tenant_name
from server.tokens import TokenKey, claims_of, parse_token_keys
from server.watched_file import WatchedFile

_SCHEME: Final = "bearer "
_API_KEY: Final = "rk_"
_REFUSED: Final = "a valid API key or token is required"
"""To whom is not known, whatever the reason is."""


class Caller(NamedTuple):
    tenant: str
    operator: bool = False
    """Sees the whole cluster, and may erase any tenant."""
    key_id: str = ""
    """Of the API key, which is no secret: for logs. Empty for a token."""


_ANYBODY: Final = Caller(DEFAULT_TENANT, operator=True)
_caller: ContextVar[Caller] = ContextVar("rekindle_caller")


def caller() -> Caller:
    """Whose call is being answered. The request itself never says."""
    return _caller.get()


def answer_for(who: Caller) -> None:
    """From now on this task's call is `who`'s."""
    _caller.set(who)


class Identities:
    """Whom to believe, by API keys and tokens. With neither, anybody is the default tenant and operator."""

    def __init__(self, config: ServerConfig) -> None:
        """Raises ConfigError for files that make no sense, OSError for those that can't be read."""
        self._config = config
        self._keys: WatchedFile[KeyRing] | None = None
        self._token_keys: WatchedFile[list[TokenKey]] | None = None
        if config.api_keys:
            self._keys = WatchedFile(config.api_keys, parse_keys)
        if config.jwt_keys:
            self._token_keys = WatchedFile(config.jwt_keys, lambda content: list(parse_token_keys(content)))

    @property
    def ask(self) -> bool:
        """Whether callers must say who they are."""
        return self._keys is not None or self._token_keys is not None

    def identify(self, metadata: Iterable[tuple[str, str | bytes]]) -> Caller:
        """Raises Unauthenticated, which doesn't say why."""
        if not self.ask:
            return _ANYBODY
        shown = [value for key, value in metadata if key == "authorization"]
        if len(shown) == 1 and isinstance(shown[0], str) and shown[0].lower().startswith(_SCHEME):
            secret = shown[0][len(_SCHEME) :].strip()
            known = self._by_key(secret) if secret.startswith(_API_KEY) else self._by_token(secret)
            if known is not None:
                return known
        raise Unauthenticated(_REFUSED)

    def limits(self, tenant: str) -> TenantLimits:
        """The tenant's, as the file has them; what it doesn't say is as in the settings."""
        config = self._config
        limits = {
            "max_sessions": config.tenant_max_sessions,
            "max_tokens": config.tenant_max_tokens,
            "max_turns": config.tenant_max_turns,
            "max_banks": config.tenant_max_banks,
        }
        if self._keys is not None:
            limits |= self._keys.read().limits.get(tenant, {})
        return TenantLimits(**limits)

    def _by_key(self, key: str) -> Caller | None:
        kept = self._keys.read().find(key) if self._keys is not None else None
        return Caller(kept.tenant, kept.operator, kept.id) if kept is not None else None

    def _by_token(self, token: str) -> Caller | None:
        if self._token_keys is None:
            return None
        config = self._config
        claims = claims_of(
            token,
            self._token_keys.read(),
            audience=config.jwt_audience,
            issuer=config.jwt_issuer,
            tenant_claim=config.jwt_tenant_claim,
        )
        tenant = claims[config.jwt_tenant_claim] if claims is not None else None
        return Caller(tenant) if is_tenant_name(tenant) else None
