# Two commands do everything on a fresh machine: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
CONSTRAINTS := -c constraints.txt
export OMP_NUM_THREADS ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test test-slow test-peers test-gpu check format bench bench-gpu worlds results docs mutants kill-tests fuzz clean

demo: $(VENV)/.stamp-demo
	$(BIN)/rlft demo --output runs/demo

test: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile

test-slow: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "slow and not gpu and not data" --timeout 1800

test-peers: $(VENV)/.stamp-bench
	$(BIN)/python -m pytest -q -m peers

test-gpu: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q -m gpu --timeout 1800

check: $(VENV)/.stamp-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(MAKE) test

format: $(VENV)/.stamp-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/.stamp-bench
	$(BIN)/python -m benchmarks.run

bench-gpu: $(VENV)/.stamp-bench
	$(BIN)/python -m benchmarks.gpu

worlds: $(VENV)/.stamp-dev
	$(BIN)/python -m benchmarks.worlds

results: $(VENV)/.stamp-dev
	$(BIN)/python -m pytest -q -m data --timeout 3600

kill-tests: $(VENV)/.stamp-dev
	$(BIN)/python -m tests.reliability

mutants: $(VENV)/.stamp-dev
	$(BIN)/python -m tests.mutation.run

fuzz: $(VENV)/.stamp-dev
	$(BIN)/python -m tests.fuzz

docs: $(VENV)/.stamp-docs
	$(BIN)/mkdocs build --strict

clean:
	rm -rf build dist site runs $(VENV)

# torch first and from the pin: asking for a range would bring another build
$(VENV)/.stamp-torch: constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) torch
	touch $@

$(VENV)/.stamp-demo: $(VENV)/.stamp-torch pyproject.toml
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[report]"
	touch $@

$(VENV)/.stamp-dev: $(VENV)/.stamp-torch pyproject.toml
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[dev]"
	touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-bench: $(VENV)/.stamp-dev
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[bench]"
	touch $@

$(VENV)/.stamp-docs: $(VENV)/.stamp-dev
	$(BIN)/python -m pip install --quiet $(CONSTRAINTS) -e ".[docs]"
	touch $@
