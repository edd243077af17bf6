"""What every test gets. Fixtures live beside their subject and are named here."""

pytest_plugins = ["tests.redis_servers", "tests.engines", "tests.systems", "tests.processes"]
