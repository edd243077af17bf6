"""Errors of the front end."""

import grpc

from cache_store.errors import ServingError
from protos.status import reason_of


class NoWorker(ServingError):
    """No worker accepts work now. One may in a moment."""


class NoEmbedder(NoWorker):
    """There are workers, and none has an embedding model."""


class WorkerLost(ServingError):
    """The connection to a worker broke, or it could not be reached."""


class WorkersLost(WorkerLost):
    """So many over one turn that it may be the turn: not to be tried again without a look."""


class WorkerRefused(ServingError):
    """A worker answered with an error of its own, which is the client's too."""

    def __init__(self, code: grpc.StatusCode, message: str, details: bytes = b"") -> None:
        super().__init__(code, message, details)  # all, so that pickle can build it again
        self.code = code
        self.message = message
        self.details = details
        """A serialized google.rpc.Status, or empty."""

    @property
    def reason(self) -> str:
        """Of google.rpc.ErrorInfo, or empty."""
        return reason_of(self.details)

    def __str__(self) -> str:
        return self.message


class WorkerFault(ServingError):
    """A worker broke the protocol, or could not start. Says which and how."""


class Unauthenticated(ServingError):
    """Nobody knows who calls. Says no more."""


class NotAllowed(ServingError):
    """The caller is known, and may not do this."""


class TenantActive(ServingError):
    """A tenant that is to be erased says more all the while, or has a turn that takes long."""


class TooManyStreams(ServingError):
    """This front end has as many open streams as it may. Another one may take it, or this one in a moment."""


class ShuttingDown(ServingError):
    """This front end takes no new calls. Another one does."""
