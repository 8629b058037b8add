# `make demo` and `make test` each do all of the set-up on a fresh machine with Python 3.11 or newer.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
# An NVIDIA GPU wants the CUDA build that the package index serves; everything else runs on what constraints.txt pins.
STAMP  := $(VENV)/.installed
DEV    := $(VENV)/.installed-dev
# The oldest Triton that pyproject.toml allows, apart from the environment's own: the machine code is gated on both.
OLDEST_TRITON := 3.6.0
OLDEST        := $(VENV)/oldest-triton/.installed-$(OLDEST_TRITON)

.PHONY: demo test lint types kernels install dev oldest-triton clean

demo: install
	$(BIN)/llmops tune recipes/quickstart.yaml

# One torch thread a process and a process a core: the tests are many small things.
test: dev lint types oldest-triton
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

lint: dev
	$(BIN)/ruff check .

types: dev
	$(BIN)/mypy src/llmops kernels/llmops_kernels

# The machine code of every kernel with all its tiles, for a GPU that need not be here; `make test` compiles a sample.
kernels: dev
	$(BIN)/python -m benchmarks.offline --check

install: $(STAMP)
dev: $(DEV)

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable .
	touch $@

# Without a network this says so and goes on: the tests that want it are then skipped, and say why.
oldest-triton: dev
	@test -f $(OLDEST) || { rm -rf $(dir $(OLDEST)); \
	  $(BIN)/python -m pip install --quiet --retries 1 --timeout 30 --no-deps --target $(dir $(OLDEST)) \
	    triton==$(OLDEST_TRITON) && touch $(OLDEST); } || echo "no Triton $(OLDEST_TRITON): its tests are skipped"

$(DEV): $(STAMP)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs dist build .pytest_cache .mypy_cache .ruff_cache
