# Needs Python >= 3.11, make and a C++ compiler. `make help` lists the targets.

SHELL := /bin/bash
.DEFAULT_GOAL := help
.NOTPARALLEL:

VENV ?= .venv
# Extras to install, pytest workers, and anything else to hand to pytest (PYTEST_ARGS="-k dpg").
EXTRAS ?= test,dev
WORKERS ?= 2
PYTEST_ARGS ?=
QUICKSTART_ARGS ?=

# The first interpreter that runs, is new enough and can make a virtual environment.
PYTHON ?= $(shell for p in python3.11 python3 python3.12 python3.13 python3.14; do \
	"$$p" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo "$$p"; break; }; \
	done)
PY := $(VENV)/bin/python
TORCH := $(shell grep '^torch==' constraints.txt)
comma := ,
INSTALLED := $(VENV)/.installed-$(subst $(comma),-,$(EXTRAS))

# Tests reach no network; console scripts of the environment (ninja, accelerate) are found by what tests launch.
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false MPLBACKEND=Agg PATH="$(abspath $(VENV))/bin:$$PATH"
PYTEST := $(TEST_ENV) $(PY) -m pytest -n $(WORKERS) --dist worksteal

.PHONY: help install quickstart lint typecheck format test test-fast docs package clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | while IFS=$$'\t' read -r name text; do \
		printf '%-12s %s\n' "$$name" "$$text"; done

# torch goes in first and alone: pip then takes a local CPU wheel of exactly this version where there is one.
$(INSTALLED): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python >= 3.11 with venv and ensurepip was found; set PYTHON=/path/to/python." >&2; exit 1; }
	@$(PY) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv --clear $(VENV)
	$(PY) -m pip install "$(TORCH)" -c constraints.txt
	$(PY) -m pip install -e ".$(if $(EXTRAS),[$(EXTRAS)])" -c constraints.txt
	@touch $@

install: $(INSTALLED) ## make .venv with the tested versions

quickstart: ## train the embedded prior four ways, measure and report: runs/quickstart/report.html (QUICKSTART_ARGS=--quick)
	@test -x $(VENV)/bin/trl-bayes || $(MAKE) install EXTRAS=
	HF_HUB_OFFLINE=1 $(VENV)/bin/trl-bayes quickstart $(QUICKSTART_ARGS)

lint: $(INSTALLED) ## ruff: rules and formatting; import-linter: the layers
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(VENV)/bin/lint-imports --no-logo --no-cache

typecheck: $(INSTALLED) ## mypy
	$(PY) -m mypy

format: $(INSTALLED) ## rewrite the code: imports, fixable rules, formatting
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

test: lint typecheck ## lint, typecheck and every test
	$(PYTEST) $(PYTEST_ARGS)

test-fast: $(INSTALLED) ## the tests that are not marked slow
	$(PYTEST) -m "not slow" $(PYTEST_ARGS)

docs: $(INSTALLED) ## build the documentation strictly, without a network: build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

# The wheel goes into an environment of its own, and is used from an empty folder: nothing of the clone helps it.
PACKAGE := build/package
package: $(INSTALLED) ## build sdist and wheel, check them, and run the quickstart, the README and two recipes from the wheel
	rm -rf dist $(PACKAGE)
	$(PY) -m build --no-isolation
	$(PY) -m twine check --strict dist/*
	$(PY) -m venv $(PACKAGE)/venv
	$(PACKAGE)/venv/bin/python -m pip install "$(TORCH)" -c constraints.txt
	$(PACKAGE)/venv/bin/python -m pip install dist/*.whl -c constraints.txt
	mkdir $(PACKAGE)/empty
	cd $(PACKAGE)/empty && env -u PYTHONPATH HF_HUB_OFFLINE=1 ../venv/bin/trl-bayes env
	cd $(PACKAGE)/empty && env -u PYTHONPATH HF_HUB_OFFLINE=1 ../venv/bin/trl-bayes quickstart --quick
	test -s $(PACKAGE)/empty/runs/quickstart/report.html
	cd $(PACKAGE)/empty && env -u PYTHONPATH HF_HUB_OFFLINE=1 ../venv/bin/python -P $(CURDIR)/tests/helpers/readme.py
	cd $(PACKAGE)/empty && env -u PYTHONPATH HF_HUB_OFFLINE=1 ../venv/bin/trl-bayes f-dpg \
		--config recipes/python_syntax/f_dpg.yaml --max_steps 2 --use_cpu --output_dir runs/f_dpg
	cd $(PACKAGE)/empty && env -u PYTHONPATH HF_HUB_OFFLINE=1 ../venv/bin/trl-bayes bench papers --figures best_of_n --seeds 0

clean: ## remove the environment, caches and build output
	rm -rf $(VENV) build dist *.egg-info .cache .pytest_cache .hypothesis .import_linter_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
