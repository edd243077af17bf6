"""The models that come with the project are found by name."""

import sys
from pathlib import Path

import pytest

from worker.errors import ModelRefused
from worker.model.shipped import locate


def test_a_shipped_model_is_found_by_name_and_any_other_is_left_as_it_is() -> None:
    assert Path(locate("rekindle-recall")).parts[-2:] == ("models", "recall")
    assert locate("preset:tiny") == "preset:tiny"


def test_a_shipped_model_that_was_not_installed_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "models", None)  # as if there were none
    with pytest.raises(ModelRefused, match="rekindle-recall is not installed"):
        locate("rekindle-recall")
