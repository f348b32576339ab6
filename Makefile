PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: demo test fuzz matrix results lint bench clean

# torch first, by its pinned version: an unpinned torch pulls gigabytes of CUDA packages.
.venv/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch $@

demo: .venv/.installed  ## Eight different pictures of each of two prompts beside the stock pipeline's.
	$(BIN)/variegate generate "an animal" food --strength 4 --blocks all -o variegate-out --overwrite

test: .venv/.installed lint  ## Everything continuous integration runs.
	$(BIN)/python -m pytest

fuzz: .venv/.installed  ## The fuzzers with new seeds; the seed of one that failed repeats it.
	VARIEGATE_FUZZ_SEED=$${VARIEGATE_FUZZ_SEED:-$$(date +%s)} VARIEGATE_FUZZ_COUNT=$${VARIEGATE_FUZZ_COUNT:-3000} \
		sh -c 'echo "VARIEGATE_FUZZ_SEED=$$VARIEGATE_FUZZ_SEED"; $(BIN)/python -m pytest tests/fuzz'

matrix: .venv/.installed  ## Every architecture and pipeline against the installed diffusers; writes two pages of docs.
	PYTHONPATH=tests/architectures $(BIN)/python tests/architectures/matrix.py
	PYTHONPATH=tests:tests/architectures $(BIN)/python tests/compatibility/table.py
	$(BIN)/python -m pytest tests/architectures tests/pipelines

results: .venv/.installed  ## Tables and pictures of docs/RESULTS.md, from the committed records.
	$(BIN)/python benchmarks/emoji/report.py

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/.installed  ## Speed, measured side by side on this machine.
	$(BIN)/python benchmarks/gram_flow.py
	$(BIN)/python benchmarks/overhead.py

clean:
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache
