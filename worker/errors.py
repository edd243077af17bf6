"""Errors of the engine: what a worker can refuse."""

from cache_store.errors import ServingError


class ModelRefused(ServingError):
    """This model can't be served exactly. Says why, by name."""


class NoEmbedder(ServingError):
    """This worker has no embedding model. Another one may."""


class ContextTooLong(ServingError):
    """Prompt plus reply would not fit the model's window (or the whole device pool)."""


class Overloaded(ServingError):
    """The queue is full. The same request may be accepted in `retry_after_s`."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message, retry_after_s)
        self.retry_after_s = retry_after_s

    def __str__(self) -> str:
        return str(self.args[0])


class Draining(ServingError):
    """The worker is leaving and takes no new work. Another one does."""


class TenantErased(ServingError):
    """All that the request's tenant has is being erased, its running turns too."""


class DeadlinePassed(ServingError):
    """The request's deadline passed before it was finished."""


class DeadlineUnmeetable(ServingError):
    """The request's first token would come after its deadline. Another worker may be less busy."""
