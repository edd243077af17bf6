"""What `rekindle serve` gives its workers to keep host memory in, and takes away again."""

from pathlib import Path
from typing import Any

import pytest

from rekindle.serve import _with_host_folder
from rekindle.settings import Settings


def settings(**values: Any) -> Settings:
    return Settings.from_values(values)


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="needs shared memory")
def test_workers_of_a_local_ray_share_a_folder_that_goes_with_the_deployment() -> None:
    with _with_host_folder(settings()) as given:
        folder = Path(given.worker.host_cache_dir)
        assert folder.parent == Path("/dev/shm")
        assert folder.is_dir()
        (folder / "slab").touch()  # as a worker that was killed leaves it
    assert not folder.exists()


@pytest.mark.parametrize(
    "values",
    [
        {"host_cache_dir": ""},
        {"host_cache_dir": "/dev/shm/mine"},
        {"ray_address": "127.0.0.1:6379"},
        {"master_keys": "env:MASTER_KEYS"},
    ],
)
def test_a_folder_that_was_chosen_stays_and_none_is_made_for_workers_elsewhere_or_that_seal(
    values: dict[str, Any],
) -> None:
    with _with_host_folder(settings(**values)) as given:
        assert given == settings(**values)
