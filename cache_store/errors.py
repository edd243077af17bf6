"""The root of every error that this project raises on purpose, and the errors of cold storage."""


class ServingError(Exception):
    """Root of every error raised on purpose. Anything else is a bug."""


class InvalidRequest(ServingError):
    """A field of the request cannot be served. Says which one."""

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)  # both, so that pickle can build it again
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}"


class StoreError(ServingError):
    """Cold storage could not do what it was asked."""


class StoreUnavailable(StoreError):
    """Redis did not answer. The same call may work in a moment."""


class StoreFull(StoreError):
    """Redis refused the bytes for want of memory."""


class BlockCorrupt(StoreError):
    """A block came back, but not as it was written."""


class BlockForeign(StoreError):
    """A block came back whole, but of another model, layout or codec."""


class RecordUnreadable(StoreError):
    """A session's record is not as it was sealed, or there is no key for it here."""


class LimitReached(ServingError):
    """The tenant has all that it may have."""

    def __init__(self, limit: str, maximum: int) -> None:
        super().__init__(limit, maximum)  # both, so that pickle can build it again
        self.limit = limit
        """max_sessions, max_tokens or max_turns."""
        self.maximum = maximum

    def __str__(self) -> str:
        return f"{self.limit}: this tenant may have {self.maximum}"


class SessionNotFound(ServingError):
    """This tenant has no such session."""


class SessionExists(ServingError):
    """The session id is taken."""


class SessionBusy(ServingError):
    """Another turn of this session is running, or has just committed."""

    def __init__(self, message: str, holder: str = "") -> None:
        """`holder` is who has the lock, where that is what is in the way."""
        super().__init__(message)
        self.holder = holder
