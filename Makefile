# Set-up, tests and the demo. Everything runs in .venv, installed from requirements.lock.
# `make EXTRA=gpu demo` installs faiss-gpu in place of faiss-cpu.

PYTHON ?= python3
EXTRA ?= cpu
BIN := .venv/bin
READY := .venv/.ready-$(EXTRA)
DEMO ?= demo
DEMO_ID ?= 000000-010
# Only in an installation with EXTRA=gpu, so never seen by the resolution below.
GPU_PINS := faiss-gpu==1.15.1 nvidia-cuda-runtime-cu12==12.9.79 nvidia-cublas-cu12==12.9.3.13 \
  nvidia-curand-cu12==10.3.10.19

.PHONY: setup demo test lint types check torture lock clean

setup: $(READY)

$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed; run make PYTHON=python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint requirements.lock --editable '.[$(EXTRA),dev]'
	@rm -f .venv/.ready-* && touch $@

demo: $(READY)
	$(BIN)/frontalis synth $(DEMO)/shards
	$(BIN)/frontalis train $(DEMO)/shards --mode per_sample --out $(DEMO)/per_sample.safetensors
	$(BIN)/frontalis train $(DEMO)/shards --mode batch_stat --out $(DEMO)/batch_stat.safetensors
	$(BIN)/frontalis reprocess --source $(DEMO)/shards --store $(DEMO)/store \
	  --model per_sample=$(DEMO)/per_sample.safetensors --model batch_stat=$(DEMO)/batch_stat.safetensors
	$(BIN)/frontalis query --store $(DEMO)/store --mode per_sample --id $(DEMO_ID) -k 5

# A file of tests stays on one worker, which has a Prefect server of its own.
test: $(READY)
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

check: lint types test

torture: $(READY)
	FRONTALIS_KILLS=60 $(BIN)/python -m pytest tests/flows/test_crash.py tests/flows/test_object_storage.py --timeout 7200

# Resolves the ranges of pyproject.toml anew, in an environment of its own, and writes every version down. torch is
# named here because the release with a CPU-only build at hand is wanted, and a CUDA build is several GB.
lock:
	rm -rf .venv-lock && $(PYTHON) -m venv .venv-lock
	.venv-lock/bin/python -m pip install --quiet torch==2.13.0 '.[cpu,dev]'
	{ echo "# Exact versions of all dependencies: written by 'make lock', used as constraints by 'make setup'."; \
	  .venv-lock/bin/python -m pip list --format=freeze --exclude frontalis --exclude pip --exclude setuptools \
	    | sed 's/+cpu$$//'; \
	  printf '%s\n' $(GPU_PINS); } > requirements.lock
	rm -rf .venv-lock build *.egg-info

clean:
	rm -rf .venv .venv-lock build *.egg-info $(DEMO)
