"""What `rekindle serve` has for its workers as long as it lives: a folder to keep host memory in, and a Redis."""

from pathlib import Path
from typing import Any

import pytest
import redis

from cache_store.open_records import open_records
from rekindle.serve import _with_host_folder, _with_redis
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


async def test_the_redis_that_comes_along_knows_front_end_and_workers_and_nobody_else() -> None:
    with _with_redis(settings(embedded_redis=True)) as given:
        url = given.server.redis_url
        assert given.worker.redis_url == url
        records = open_records(url)
        assert await records.available()
        await records.aclose()
        with (
            redis.Redis(port=int(url.rpartition(":")[2]), protocol=2) as stranger,
            pytest.raises(redis.AuthenticationError),
        ):
            stranger.ping()
