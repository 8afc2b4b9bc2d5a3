# make up     sets everything up and runs the main job: a local server, a question, its answer
# make test   sets everything up and runs the tests
# make check  lint and tests: what CI runs
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
MODEL ?= smollm2-135m-instruct
# uv does not read pip's variable; a folder with torch's CPU build may be named there.
ifdef PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)
endif
# A shared machine's variable that makes every import compile its modules again.
unexport PYTHONDONTWRITEBYTECODE

BIN := .venv/bin
UV := $(BIN)/uv
NODE_PYTHON = $(shell $(BIN)/mistralctl doctor -o json | $(BIN)/python -c 'import json, sys; print(json.load(sys.stdin)["node"]["python"])')
PYTEST_OPTIONS ?= -q

.PHONY: help setup node up down test test-deploy test-weights test-plugin test-e2e check lint format schema bench clean

help:
	@sed -n 's/^# //p' Makefile | head -n 3

setup: .venv/.made

.venv/.made: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt uv
	$(UV) pip install --quiet --python $(BIN)/python --constraint constraints.txt --editable '.[all]' --group dev
	touch $@

# The node's environment with vLLM: where `mistralctl doctor` says, made once, shared with `--cloud local`.
node: .venv/.made
	bash model/node/environment.sh cpu "$$($(BIN)/python -c 'from mistralctl import node; print(node.local_python_version())')" \
	  "$(patsubst %/bin/python,%,$(NODE_PYTHON))" "$(CURDIR)/$(UV)"

# The tests of the node's packages run beside vLLM, without writing into its environment.
.venv-node/.made: tests/plugin/requirements.txt model/plugin/pyproject.toml $(wildcard model/node/vllm-cpu/*) | node
	rm -rf .venv-node
	$(UV) venv --quiet --python $(NODE_PYTHON) .venv-node
	$(NODE_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-node/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/node.pth"
	$(UV) pip install --quiet --python .venv-node/bin/python --no-deps --requirement tests/plugin/requirements.txt \
	  --editable model/plugin --editable model/weights
	touch $@

up: .venv/.made
	$(BIN)/mistralctl up $(MODEL) --cloud local
	@echo; echo '$$ mistralctl chat $(MODEL) -m "What is the capital of France?"'
	@$(BIN)/mistralctl chat $(MODEL) -m "What is the capital of France?"
	@echo; echo "stop it: make down"

down: .venv/.made
	$(BIN)/mistralctl down --all

test: test-deploy test-plugin test-e2e

test-deploy: .venv/.made
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) tests/deploy

test-plugin: .venv-node/.made
	cd tests/plugin && HF_HUB_OFFLINE=1 ../../.venv-node/bin/python -m pytest $(PYTEST_OPTIONS) .

test-e2e: .venv/.made
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) tests/e2e

lint: .venv/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR model/node/*.sh .ci/run

format: .venv/.made
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The JSON schema of mistralctl.yaml, after a change of DeploymentSpec.
schema: .venv/.made
	$(BIN)/python -c 'import json; from mistralctl.spec import json_schema; print(json.dumps(json_schema(), indent=1))' \
	  > deploy/mistralctl/mistralctl.schema.json

check: lint test

bench: .venv/.made
	for program in benchmarks/*.py; do $(BIN)/python "$$program"; done

clean:
	rm -rf .venv .venv-node build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
