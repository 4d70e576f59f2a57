# `make demo` and `make test` need python3 (3.11 or newer) and make; everything else they set up in .venv.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready
SLIM := .cache/slim
HUB := .cache/hub

.DEFAULT_GOAL := help
.PHONY: help setup demo test check lint types fences protos slim-test wheel-test check-applications check-hub bench bench-quick bench-command bench-convert coverage format lock clean

help:  ## Show this list.
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: $(READY)  ## Create .venv with exactly what requirements.lock names.

$(READY): requirements.lock pyproject.toml scripts/setup.py
	@echo "Setting up .venv …"
	@$(PYTHON) scripts/setup.py
	@touch $@

demo: setup  ## Train, convert, register, deploy and query a real model.
	@$(BIN)/penstock demo

test: setup  ## Run the whole test suite.
	@$(BIN)/pytest

check: lint types fences protos slim-test wheel-test  ## Run every check that is not a test of behaviour, and the tests without TensorFlow.

lint: setup  ## Style and formatting.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: setup  ## mypy --strict.
	$(BIN)/mypy

fences: setup  ## Who may import whom.
	$(BIN)/lint-imports

protos: setup  ## buf's lint, format and breaking changes; generated stubs up to date.
	cd protos && ../$(BIN)/buf lint && ../$(BIN)/buf format --diff --exit-code
	cd protos && ../$(BIN)/buf breaking --against released.binpb
	$(BIN)/python protos/generate.py --check

slim-test: setup  ## The tests of inference, rpc and client in an environment without TensorFlow.
	$(BIN)/uv venv --quiet --clear --python $(BIN)/python $(SLIM)
	$(BIN)/uv pip install --quiet --python $(SLIM)/bin/python --constraint requirements.lock --compile-bytecode \
		--group test --editable '.[inference,tracing,registry]' onnx 'tritonclient[grpc]'
	! $(SLIM)/bin/python -c 'import tensorflow' 2>/dev/null && ! $(SLIM)/bin/python -c 'import keras' 2>/dev/null
	$(SLIM)/bin/python -m pytest tests/unit/rpc tests/unit/inference tests/unit/client tests/integration/rpc tests/integration/inference

check-applications: setup  ## Convert a model of every family of keras.applications: minutes.
	$(BIN)/pytest tests/conformance/keras/test_applications.py -m "slow or not slow"

check-hub: setup  ## Convert backbones of KerasHub, which is put beside .venv, without TensorFlow Text.
	$(BIN)/uv pip install --quiet --no-deps --python $(BIN)/python --target $(HUB) \
		keras-hub==0.32.0 kagglehub==1.0.3 kagglesdk==0.1.28 regex sentencepiece tokenizers tqdm
	PYTHONPATH=$(HUB) $(BIN)/pytest tests/conformance/keras/test_kerashub.py

wheel-test: setup  ## What is in the wheel, and that it installs.
	$(BIN)/pytest tests/packaging

bench: setup  ## Measure the inference service beside its references: ten minutes.
	@$(BIN)/python -m tests.benchmarks.inference

bench-quick: setup  ## The same, short: whether it works, not how fast it is.
	@$(BIN)/python -m tests.benchmarks.inference --quick

bench-command: setup  ## How long the command takes to answer.
	@$(BIN)/python tests/benchmarks/command.py

bench-convert: setup  ## Measure converted graphs beside tf2onnx's own and TensorFlow: several minutes.
	@$(BIN)/python -m tests.benchmarks.converters

coverage: setup  ## Write docs/coverage-keras.md from the table of cases.
	@$(BIN)/python -m tests.conformance.keras

format: setup  ## Bring code and protos into their form.
	$(BIN)/ruff check --fix --quiet . || true
	$(BIN)/ruff format --quiet .
	cd protos && ../$(BIN)/buf format --write
	$(BIN)/python protos/generate.py

lock: setup  ## Choose the newest versions that pyproject.toml allows and write requirements.lock.
	$(BIN)/uv lock --quiet --upgrade
	$(BIN)/uv export --quiet --all-extras --no-extra pytorch --all-groups --no-emit-project --no-header --no-annotate -o requirements.lock

clean:  ## Remove .venv and everything that was built.
	rm -rf .venv .cache dist penstock-demo .mypy_cache .ruff_cache .pytest_cache .hypothesis
