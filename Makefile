# Two commands do everything: `make demo` and `make test`.  Both make .venv first.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready

.PHONY: venv demo test lint types unit parity structured gpu-test chaos chaos-ci readmission storm \
	soak fuzz pictures clean

venv: $(STAMP)

$(STAMP): requirements.txt requirements-dev.txt pyproject.toml
	@tools/make_venv.sh "$(PYTHON)" "$(VENV)"
	@touch $@

# Fetches the demo model, starts a node with two groups, asks it something,
# shows what each group did, stops it and leaves nothing behind.
demo: venv
	@$(BIN)/python tools/demo.py

test: lint types unit

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Types and the import contract, on an installed copy.
types: venv
	@tools/check_types.sh "$(BIN)"

# In two processes: many tests wait for a node most of the time.
unit: venv
	@$(BIN)/python tools/warm_caches.py
	$(BIN)/python -m pytest -n 2 --dist worksteal

# 50 prompts x 64 greedy tokens against transformers, in every shape.
parity: venv
	$(BIN)/python -m pytest -m parity -s

# 200 answers of the demo model to 20 JSON schemas: all are valid.
structured: venv
	$(BIN)/python -m pytest -m parity -s tests/grammar

# On a machine with a GPU: in .venv where there is one, else in the Python that has
# PyTorch with CUDA, once `pip install --no-deps -e .` has put the package there.
# Four processes share each GPU, for most of the time is compilation; then come the tests that have
# it, or two of them, for themselves.
GPUS = $(shell nvidia-smi -L 2>/dev/null | wc -l)
GPU_PYTHON = OMP_NUM_THREADS=8 $(if $(wildcard $(STAMP)),$(BIN)/python,$(PYTHON))
gpu-test:
	@$(GPU_PYTHON) -c "import sys, triton, torch; sys.exit(not torch.cuda.is_available())" 2>/dev/null || \
		{ echo "make gpu-test: no GPU, CUDA build of PyTorch or Triton for $(lastword $(GPU_PYTHON));" \
		"without .venv, PYTHON=... says which Python has them" >&2; exit 1; }
	$(GPU_PYTHON) -m pytest -m "gpu and not alone" tests/gpu -n $$((4 * $(GPUS))) --dist worksteal --durations=10
	$(GPU_PYTHON) -m pytest -m "gpu and alone" tests/gpu --durations=5

# Kills, stops and starves every process of a node under load: for 10 minutes in all cells of the
# matrix role x phase x fault, for 3 at most in a selection with every pair.  An empty cell fails
# both.  CHAOS="--seed N" repeats a run.
chaos: venv
	$(BIN)/python -m tests.chaos $(CHAOS)

chaos-ci: venv
	$(BIN)/python -m tests.chaos --pairwise --minutes 3 $(CHAOS)

# How long streams wait for another group when theirs is killed; READMISSION="--kills 100".
readmission: venv
	$(BIN)/python -m tests.chaos.readmission $(READMISSION)

# 20 times 1,000 clients that connect, ask and vanish; STORM="--seed N".
storm: venv
	$(BIN)/python -m tests.endurance.storm $(STORM)

# A day's requests in 15 minutes, with flat memory and open files; SOAK="--minutes 15 --seed N".
soak: venv
	$(BIN)/python -m tests.endurance.soak $(SOAK)

# 10 million random and mutated messages; FUZZ="--messages N --seed N".
fuzz: venv
	$(BIN)/python -m tests.fuzz $(FUZZ)

# The pictures of the docs, with a headless Chromium and the demo model.
pictures: venv
	$(BIN)/python tools/screenshots.py

clean:
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
