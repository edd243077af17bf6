"""Who may import whom, what a process loads, and that generated code is what its sources say."""

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import grpc_tools.protoc  # type: ignore[import-untyped]
import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("protos", "cache_store", "worker", "server", "rekindle", "models", "benchmarks")

MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "protos": (),
    "cache_store": (),
    "worker": ("cache_store",),
    "server": ("protos", "cache_store"),
    "rekindle": ("protos",),
    "models": (),
}
"""Besides itself. Files that may do more are named below, each with what more."""

EXCEPTIONS: dict[str, tuple[str, ...]] = {
    "worker/app.py": ("protos.tls",),
    "worker/embedding_service.py": ("protos",),
    "worker/publisher.py": ("protos",),
    "worker/service.py": ("protos",),
    "worker/status.py": ("protos",),
    "worker/translate.py": ("protos",),
    "rekindle/cli_keys.py": ("server.api_keys", "server.config"),
    "rekindle/cli_measure.py": ("benchmarks",),
    "rekindle/settings.py": ("server.config", "worker.config"),
    "rekindle/serve.py": ("server", "worker.actor", "worker.config", "cache_store"),
    "rekindle/scale.py": ("server.ray_scale",),
    "rekindle/demo.py": ("server", "worker.actor", "worker.config", "cache_store"),
}

ONLY_IN: dict[str, tuple[str, ...]] = {
    "ray": ("benchmarks/chaos_ray.py", "server/ray_cluster.py", "server/ray_scale.py", "worker/actor.py"),
    "redis": ("cache_store/", "benchmarks/"),
    "torch": ("worker/", "models/", "benchmarks/"),
    "transformers": ("worker/", "models/", "benchmarks/"),
    "prometheus_client": ("server/metrics.py", "server/metrics_endpoint.py", "worker/metrics.py", "benchmarks/"),
    "jwt": ("server/tokens.py",),
    "starlette": ("server/http_",),
    "uvicorn": ("server/http_app.py",),
}
"""Libraries, and the only places that know them."""


def sources() -> list[Path]:
    return [
        path
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if not path.stem.endswith(("_pb2", "_pb2_grpc"))
    ]


def imports(path: Path) -> set[str]:
    """Every module that a file names in an import, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def under(module: str, parents: tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_imports_only_what_its_folder_may(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    package = name.split("/")[0]
    if package == "benchmarks":
        return
    allowed = (package, *MAY_IMPORT[package], *EXCEPTIONS.get(name, ()))
    ours = {module for module in imports(path) if under(module, PACKAGES)}
    assert {module for module in ours if not under(module, allowed)} == set()


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_library_is_known_only_where_it_belongs(path: Path) -> None:
    name = path.relative_to(ROOT).as_posix()
    known = {library for library in ONLY_IN if any(under(module, (library,)) for module in imports(path))}
    assert {library for library in known if not name.startswith(ONLY_IN[library])} == set()


def loaded_by(statement: str) -> set[str]:
    """The top-level modules that a fresh process has after the statement."""
    code = f"import sys\n{statement}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    process = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(process.stdout.split())


def test_the_front_ends_process_loads_neither_torch_nor_a_worker() -> None:
    loaded = loaded_by("import server.app, server.http_memory, server.ray_cluster, server.logs")
    assert loaded & {"torch", "transformers", "worker"} == set()


@pytest.mark.parametrize("module", ["worker.config", "worker.calls", "worker.actor"])
def test_what_the_serve_command_needs_of_the_worker_is_light(module: str) -> None:
    assert loaded_by(f"import {module}") & {"torch", "transformers"} == set()


def test_the_client_loads_neither_server_nor_worker() -> None:
    loaded = loaded_by("import rekindle.client")
    assert loaded & {"server", "worker", "cache_store", "ray", "torch", "redis"} == set()


def test_cold_storage_works_without_ray() -> None:
    assert loaded_by("import cache_store.redis_store") & {"ray", "grpc"} == set()


def test_the_engine_works_without_ray_and_without_redis() -> None:
    assert loaded_by("import worker.engine.build_engine") & {"ray", "grpc", "redis"} == set()


def test_generated_code_is_what_the_protos_say(tmp_path: Path) -> None:
    protos = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "protos").glob("*.proto"))
    outputs = [f"--{kind}={tmp_path}" for kind in ("python_out", "pyi_out", "grpc_python_out")]
    assert grpc_tools.protoc.main(["protoc", f"-I{ROOT}", *outputs, *protos]) == 0
    made = sorted((tmp_path / "protos").iterdir())
    assert len(made) == 3 * len(protos)
    for path in made:
        assert path.read_text() == (ROOT / "protos" / path.name).read_text(), f"{path.name}: run `make protos`"


@pytest.mark.parametrize("name", PACKAGES)
def test_no_other_distribution_owns_our_name(name: str) -> None:
    assert set(importlib.metadata.packages_distributions()[name]) == {"rekindle"}
