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
    """A session's record, or a part of a bank, is not as it was sealed, or there is no key for it here."""


class LimitReached(ServingError):
    """The tenant has all that it may have."""

    def __init__(self, limit: str, maximum: int) -> None:
        super().__init__(limit, maximum)  # both, so that pickle can build it again
        self.limit = limit
        """max_sessions, max_tokens, max_turns or max_banks."""
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


class BankNotFound(ServingError):
    """This tenant has no such bank."""


class BankExists(ServingError):
    """The bank's name is taken."""


class BankFull(LimitReached):
    """A bank has as many entries as it may."""

    def __str__(self) -> str:
        return f"{self.limit}: a bank may have {self.maximum}"


class EntriesMissing(ServingError):
    """Entries that are named in a request are not in the bank."""

    def __init__(self, ids: tuple[str, ...]) -> None:
        super().__init__(ids)  # as it was given, so that pickle can build it again
        self.ids = ids

    def __str__(self) -> str:
        return f"there is no entry {', '.join(self.ids)}"


class EmbedderChanged(ServingError):
    """A bank's vectors are of another embedding model than those that are to be compared with them."""

    def __init__(self, bank: str, theirs: str, ours: str) -> None:
        super().__init__(bank, theirs, ours)  # all, so that pickle can build it again
        self.bank = bank
        self.theirs = theirs
        """The bank's embedder."""
        self.ours = ours

    def __str__(self) -> str:
        return (
            f"the vectors of bank {self.bank} are of the embedding model {self.theirs[:16]}, and the workers have "
            f"{self.ours[:16]}: Reembed (`rekindle memory reembed {self.bank}`) makes new ones"
        )
