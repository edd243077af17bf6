"""One settings object from three configs, each setting described once."""

from dataclasses import MISSING, fields

import pytest

from rekindle.settings import Settings, SystemConfig, all_settings, field_docs
from server.config import ServerConfig
from worker.config import WorkerConfig, parse_weights

CONFIGS = (ServerConfig, WorkerConfig, SystemConfig)
NAMES = [setting.name for setting in all_settings()]


def test_every_setting_is_there_once_with_a_help_text_and_a_default() -> None:
    settings = list(all_settings())
    assert len(set(NAMES)) == len(NAMES)
    assert all(setting.help.endswith(".") for setting in settings)
    assert all(setting.default is not MISSING for setting in settings)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_field_can_be_set(config: type) -> None:
    for field in fields(config):
        assert field.name in NAMES or f"worker_{field.name}" in NAMES
        assert field.name in field_docs(config)


def test_one_redis_url_sets_both_sides() -> None:
    settings = Settings.from_values({"redis_url": "redis://elsewhere:1", "redis_timeout_s": 0.5, "block_ttl_s": 7})
    for part in (settings.server, settings.worker):
        assert (part.redis_url, part.redis_timeout_s, part.block_ttl_s) == ("redis://elsewhere:1", 0.5, 7)


@pytest.mark.parametrize("config", [ServerConfig, WorkerConfig])
def test_settings_show_no_password_when_printed(config: type) -> None:
    assert "s3cret" not in repr(config(redis_url="redis://user:s3cret@host"))


def test_a_name_that_both_sides_have_for_themselves_is_two_settings() -> None:
    settings = Settings.from_values({"metrics_port": 1, "worker_metrics_port": 2, "worker_listen_host": "::1"})
    assert (settings.server.metrics_port, settings.worker.metrics_port) == (1, 2)
    assert (settings.server.listen_host, settings.worker.listen_host) == ("127.0.0.1", "::1")


def test_names_that_both_sides_share_have_one_default() -> None:
    for field in fields(ServerConfig):
        both = {other.name: other.default for other in fields(WorkerConfig)}
        if field.name in both and f"worker_{field.name}" not in NAMES:
            assert both[field.name] == field.default


def test_no_values_are_the_defaults() -> None:
    assert Settings.from_values({}) == Settings(server=ServerConfig(), worker=WorkerConfig(), system=SystemConfig())


@pytest.mark.parametrize(
    ("name", "value"),
    [("num_workers", 0), ("gpus_per_worker", -1.0), ("block_tokens", 24), ("port", 70_000), ("lease_s", 1.0)],
)
def test_an_impossible_value_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=name):
        Settings.from_values({name: value})


def test_a_docstring_serves_all_fields_right_above_it() -> None:
    class Pair:
        low: int = 0
        high: int = 1
        """Both
        ends."""
        bare: int = 2

    assert field_docs(Pair) == {"low": "Both ends.", "high": "Both ends."}


@pytest.mark.parametrize("weights", ["acme", "acme=0", "acme=-1", "acme=nan", "acme=inf", "=2", "a=1,a=2", "acme=much"])
def test_weights_that_cannot_work_are_refused_by_name(weights: str) -> None:
    with pytest.raises(ValueError, match="tenant_weights"):
        Settings.from_values({"tenant_weights": weights})


def test_weights_are_read_by_tenant() -> None:
    assert parse_weights("acme=4, a=b=0.5") == {"acme": 4.0, "a=b": 0.5}
    assert parse_weights("") == {}
