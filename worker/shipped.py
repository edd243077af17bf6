"""The models that come with the project, by name."""

from importlib.util import find_spec
from pathlib import Path

_SHIPPED = {"rekindle-recall": "recall"}
"""Name to folder of the `models` package."""


def locate(model: str) -> str:
    """The directory of a model that comes with the project; any other name, directory or hub id as it is."""
    if model not in _SHIPPED:
        return model
    spec = find_spec("models")
    assert spec is not None, "the package `models` is not installed"
    assert spec.submodule_search_locations, "`models` is no package"
    return str(Path(spec.submodule_search_locations[0], _SHIPPED[model]))
