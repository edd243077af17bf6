"""`rekindle tenants`: what can be done with all that a tenant has. Quick to import: no gRPC."""

from cyclopts import App

from rekindle.cli_connection import AsJson, Connection, print_message


def tenants_app() -> App:
    app = App(name="tenants", help="Erase a tenant.")
    app.command(erase)
    return app


def erase(
    tenant: str = "",
    /,
    *,
    as_json: AsJson = False,
    connection: Connection = Connection(),
) -> None:
    """Remove every conversation of a tenant, and its cache from every tier. Waits for turns in progress.

    Parameters
    ----------
    tenant
        Whose; without one, that of the API key. Another than that takes an operator's key.
    """
    with connection.open() as client:
        print_message(client.erase_tenant(tenant), as_json)
