# Set-up, tests and the demo. Everything runs in .venv, installed from the hashed locks in requirements/.
#
#   make EXTRA=gpu demo            with faiss-gpu in place of faiss-cpu
#   make TORCH_INDEX=URL setup     with the build of torch that this index serves (PyTorch has one at …/whl/cpu), its hash
#                                  unchecked. Without it Linux gets PyPI's build, with CUDA's several GB, unless pip
#                                  finds the file that requirements/torch-cpu.txt names
#   make PYTHON=python3.12 setup   with another Python
#
# Plain pip works, too: pip install -e '.[cpu,dask,losses,dev]' takes the newest versions that pyproject.toml allows.

PYTHON ?= python3
EXTRA ?= cpu
TORCH_INDEX ?=
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --quiet --no-deps
# torch comes first, for EXTRA=cpu without CUDA if pip finds such a build: by itself it prefers PyPI's, with CUDA.
TORCH := $(INSTALL) --require-hashes --requirement requirements/torch-$(EXTRA).txt 2> /dev/null || true
ifneq ($(TORCH_INDEX),)
TORCH := $(INSTALL) --index-url $(TORCH_INDEX) $$(grep -o '^torch==[^ ]*' requirements/base.txt)
endif
LOCKS := $(patsubst %,requirements/%.txt,base $(EXTRA) dask losses dev)
READY := .venv/.ready-$(EXTRA)
DEMO ?= demo
DEMO_ID ?= 000000-010

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast lint format types check torture lock clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s  %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(READY) ## install everything into .venv (EXTRA=gpu: with faiss-gpu)

$(READY): $(LOCKS) requirements/cuda.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; run make PYTHON=python3.11"; exit 1; }
	test -e $@ || $(PYTHON) -m venv --clear .venv
	$(TORCH)
	$(INSTALL) --require-hashes $(addprefix --requirement ,$(LOCKS))
	! $(BIN)/python -m pip show torch | grep -q nvidia || $(INSTALL) --require-hashes --requirement requirements/cuda.txt
	$(INSTALL) --no-build-isolation --editable .
	$(BIN)/python -m pip check
	@rm -f .venv/.ready-* && touch $@

# `synth` overwrites nothing, so shards that are complete are used again.
$(DEMO)/shards/_SUCCESS: | $(READY)
	$(BIN)/frontalis synth $(DEMO)/shards
	@touch $@

# A validation part of over 100 subjects takes the place of cross-validation, which would double the time of training.
demo: $(READY) $(DEMO)/shards/_SUCCESS ## make a small store from synthetic shards and query it (DEMO=folder)
	$(BIN)/frontalis train $(DEMO)/shards --mode per_sample --validation 0.25 --out $(DEMO)/per_sample.safetensors
	$(BIN)/frontalis train $(DEMO)/shards --mode batch_stat --validation 0.25 --out $(DEMO)/batch_stat.safetensors
	$(BIN)/frontalis reprocess --source $(DEMO)/shards --store $(DEMO)/store \
	  --model per_sample=$(DEMO)/per_sample.safetensors --model batch_stat=$(DEMO)/batch_stat.safetensors
	$(BIN)/frontalis query --store $(DEMO)/store --mode per_sample --id $(DEMO_ID) -k 5

# Several workers with threads of their own would only fight for the cores.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1

# A file of tests stays on one worker, so that what its tests share is made once.
test: $(READY) ## run all tests
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder

test-fast: $(READY) ## run the tests that are not slow by nature
	$(ONE_THREAD) $(BIN)/python -m pytest --numprocesses auto --dist worksteal -m 'not e2e'

lint: $(READY) ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(READY) ## repair style and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(READY) ## check types
	$(BIN)/mypy

check: lint types test ## lint, types and test: what must be green before a change lands

torture: $(READY) ## 60 kills on disk and on S3 each, 60 power cuts, 400 runs, 10,000 shards, 5,000 hostile commands
	FRONTALIS_KILLS=60 FRONTALIS_CUTS=60 FRONTALIS_RUNS=400 FRONTALIS_SHARDS=10000 FRONTALIS_FUZZED=5000 \
	  $(BIN)/python -m pytest -rP --durations 10 --timeout 7200 \
	  tests/flows/test_crash.py tests/flows/test_object_storage.py tests/flows/test_power_cut.py \
	  tests/tasks/maintenance/test_growth.py tests/tasks/test_many_shards.py tests/frontalis/test_hostile_commands.py

lock: ## resolve the dependencies again and write requirements/*.txt
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet uv==0.13.9
	.venv-lock/bin/python requirements/lock.py
	rm -rf .venv-lock

clean: ## remove the environment, the demo and what builds leave
	rm -rf .venv .venv-lock build *.egg-info $(DEMO)
