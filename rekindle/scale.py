"""`rekindle scale`: ask a running `rekindle serve` for more workers or fewer, and wait until it has them."""

from rich.console import Console

from server import ray_scale


def scale(count: int, *, ray_address: str, timeout_s: float) -> None:
    """Exits with a message where that can't be, or takes longer than `timeout_s`."""
    if count < 1:
        raise SystemExit(f"rekindle: at least 1 worker, got {count}")
    try:
        before = ray_scale.ask_for(count, address=ray_address)
    except (OSError, LookupError) as error:
        raise SystemExit(f"rekindle: {error}") from error
    with Console(stderr=True).status(f"from {before} to {count} workers"):
        if not ray_scale.wait_for(count, timeout_s=timeout_s):
            raise SystemExit(f"rekindle: {ray_scale.num_workers()} of {count} workers after {timeout_s:g} s")
    print(f"{count} workers serve, {before} did")
