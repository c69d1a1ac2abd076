# The words that the README and CI use. Each sets up what it needs first; `make` alone lists them.

PYTHON ?= python3
PORT ?= 3000
UV ?= uv
ARGS ?=
IN_VENV = @. .venv/bin/activate &&

.DEFAULT_GOAL := help
.PHONY: help ready setup quickstart test check dev bench storm reproduce-cifar10 lock

help: ## List these words
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-18s %s\n", $$1, $$2 }' Makefile

ready:
	@$(PYTHON) scripts/setup.py

setup: ready ## Make .venv (7 GB) and the Dagster instance in .dagster
	@echo "Ready. In a shell: . .venv/bin/activate"

quickstart: ready ## Run the whole pipeline on real handwritten digits, minutes on two CPU cores
	$(IN_VENV) NESTDIFF_EXPERIMENT=digits dagster job execute -m pipelines.definitions -j quickstart
	$(IN_VENV) python -m nestdiff_core inspect digits

test: ready ## Run the tests; ARGS are pytest's, as in: make test ARGS="-k schedule"
	$(IN_VENV) python -m pytest -m "not slow" -n 2 --dist loadfile --no-loadscope-reorder $(ARGS)

check: ready ## Run the linter, the formatter, the type checker and the import rules
	$(IN_VENV) ruff check
	$(IN_VENV) ruff format --check
	$(IN_VENV) basedpyright
	$(IN_VENV) lint-imports --no-logo

dev: ready ## Open Dagster's web UI on this machine, PORT=3000
	$(IN_VENV) dagster dev -w workspace.yaml -h 127.0.0.1 -p $(PORT)

bench: ready ## Measure against peers; ARGS are those of scripts.bench
	$(IN_VENV) python -m scripts.bench $(ARGS)

storm: ready ## Repeat the faults hundreds of times: kills, damage, fuzz
	$(IN_VENV) python -m pytest -m slow --timeout=0 $(ARGS)

reproduce-cifar10: ready ## Make the table of docs/results.md, on a CPU or a GPU; ARGS=--dry-run says how long it takes
	$(IN_VENV) python -m scripts.reproduce $(ARGS)

lock: ## Bring requirements.lock up to pyproject.toml with uv; ARGS=--upgrade takes newer versions
	@$(UV) pip compile pyproject.toml --extra dev --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --custom-compile-command "make lock" --quiet --output-file requirements.lock $(ARGS)
