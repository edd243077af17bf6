"""The models that come with the project, by name."""

from importlib.util import find_spec
from pathlib import Path

from worker.errors import ModelRefused

_SHIPPED = {"rekindle-recall": "recall"}
"""Name to folder of the `models` package."""


def locate(model: str) -> str:
    """The directory of a model that comes with the project; any other name, directory or hub id as it is.

    Raises ModelRefused where the project was installed without its models.
    """
    if model not in _SHIPPED:
        return model
    spec = find_spec("models")
    if spec is None or not spec.submodule_search_locations:
        raise ModelRefused(f"{model} is not installed here: the package `models`, which it comes in, is missing")
    return str(Path(spec.submodule_search_locations[0], _SHIPPED[model]))
