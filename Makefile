# Needs Python 3.11 or newer, make, and the package registry. Everything is installed into .venv.
PYTHON ?= python3
GPU_PYTHON ?= python3
GPU_PATH := .typecheck$(if $(PYTHONPATH),:$(PYTHONPATH))
BIN := .venv/bin
TESTS := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder
PIP := $(BIN)/python -m pip install -q --disable-pip-version-check

DEMO_MODEL := tests/emoji_model/model
DEMO_CONFIG ?= launch/configs/layerwise_ulysses2_ring2.yaml
PROMPT ?= a red apple

.PHONY: demo quick test test-all test-gpu test-faults bench bench-gpu lint typecheck clean

.venv/.installed: pyproject.toml .ci/constraints.txt .ci/oracles.txt .ci/peft.txt
	$(PYTHON) -m venv .venv
	$(PIP) "torch==$$(sed -n 's/^torch==//p' .ci/constraints.txt)"
	$(PIP) -c .ci/constraints.txt -e ".[replicas,serve,dev]"
	$(PIP) --no-deps -r .ci/oracles.txt
	$(PIP) --no-deps --upgrade --target .venv/peft -r .ci/peft.txt
	touch $@

demo: .venv/.installed
	mkdir -p demo
	$(BIN)/crossdock generate $(DEMO_MODEL) --config $(DEMO_CONFIG) --prompt "$(PROMPT)" \
		--height 48 --width 48 --steps 16 --guidance-scale 3 --out demo/out.png --report demo/report.json

# What needs no ranks, and one gang.
quick: .venv/.installed
	CROSSDOCK_TESTS=quick $(TESTS)

test: .venv/.installed
	$(TESTS)

# Every family in every layout, every planted fault on all layouts that are named for it.
test-all: .venv/.installed
	CROSSDOCK_TESTS=all $(TESTS)

# The tree of links makes `import crossdock` work without an installation, for mypy and for a GPU machine's own python.
.typecheck/crossdock:
	mkdir -p $@
	for folder in launch offload parallel runtime; do ln -sfn ../../$$folder $@/$$folder; done

test-gpu: .typecheck/crossdock
	PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) -m pytest -m gpu

# Over a hundred faults, one after the other; `make test` has a few of them.
test-faults: .venv/.installed
	CROSSDOCK_TESTS=all CROSSDOCK_FAULTS=100 $(BIN)/python -m pytest -s tests/test_faults.py

bench: .venv/.installed
	$(BIN)/python tests/benchmarks/hsdp_vs_fsdp.py
	$(BIN)/python tests/benchmarks/layerwise.py
	$(BIN)/python tests/benchmarks/layerwise.py --budgets 10 --tokens 256
	$(BIN)/python tests/benchmarks/checking.py
	$(BIN)/python tests/benchmarks/recovery.py
	$(BIN)/python tests/benchmarks/startup.py

bench-gpu: .typecheck/crossdock
	PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) tests/benchmarks/layerwise.py --size flux-dev
	PYTHONPATH=$(GPU_PATH) $(GPU_PYTHON) tests/benchmarks/layerwise.py --size flux-dev --budgets 10

lint: .venv/.installed
	$(BIN)/ruff check
	$(BIN)/ruff format --check

typecheck: .venv/.installed .typecheck/crossdock
	$(BIN)/mypy

clean:
	rm -rf .venv .typecheck demo .pytest_cache .mypy_cache .ruff_cache *.egg-info
