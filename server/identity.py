"""Who calls. The one place that decides it: tenants name sessions and salt block hashes."""

from typing import Any, Final

import grpc.aio

_ONLY_TENANT: Final = "default"


def tenant_of(context: grpc.aio.ServicerContext[Any, Any]) -> str:
    """The caller's tenant. There is one until calls are authenticated; the request itself never says."""
    del context
    return _ONLY_TENANT
