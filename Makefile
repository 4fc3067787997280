# `make demo` and `make test` set up all they need in .venv. `make gpu-test` runs in the active Python of a machine with
# a CUDA GPU, where torch, transformers, peft, pytest, pybind11 and ninja are installed.
PYTHON ?= python3
VENV ?= .venv
# An exact version: a range lets pip replace an installed CPU build by gigabytes of CUDA.
TORCH ?= torch==2.13.0

BIN := $(VENV)/bin
NATIVE_SOURCES := setup.py scripts/toolchain.py scripts/native_build.py $(shell find csrc -type f -name '*.[ch]*')

.PHONY: setup demo test slow-test lint wheel-test page-test quantized-test trl-test zero-test stacks-test examples-test oldest-test resources mutants gpu-test gpu-sanitize gpu-bench gpu-profile clean

setup: $(VENV)/.native

$(VENV)/.python: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet $(TORCH)
	$(BIN)/pip install --quiet 'setuptools>=77' wheel 'pybind11>=2.13' ninja
	PLOP_CUDA=$${PLOP_CUDA:-auto} $(BIN)/pip install --quiet --no-build-isolation --editable '.[dev]'
	touch $@

$(VENV)/.native: $(VENV)/.python $(NATIVE_SOURCES)
	$(BIN)/python setup.py --quiet build_ext --inplace
	touch $@

# A folder of its own each time: a run is never replaced.
demo: setup
	$(BIN)/plop demo -o runs/demo-$$(date +%Y%m%d-%H%M%S)

# Files side by side, each with one thread: on two cores in three quarters of the time. A process takes 1.5 GB.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

test: setup
	$(PYTEST)

slow-test: setup
	$(PYTEST) -m slow

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python scripts/check_words.py
	find csrc -name '*.[ch]*' | xargs $(BIN)/clang-format --dry-run --Werror
	for page in README.md benchmarks/README.md docs/statistics.md; do \
	  $(BIN)/python -m benchmarks.to_markdown benchmarks/results/*.json --check $$page || exit 1; \
	done
	$(BIN)/python -m benchmarks.resources --check benchmarks/results/resources.json

# Registers, shared memory and spills of the CUDA kernels; needs nvcc and no GPU. `make lint` checks what this writes.
resources: setup
	$(BIN)/python -m benchmarks.resources --output benchmarks/results/resources.json
	$(BIN)/python -m benchmarks.to_markdown benchmarks/results/*.json --update benchmarks/README.md

# The sdist builds, and its wheel installs and scores in an empty environment.
wheel-test: setup
	BIN=$(BIN) TORCH='$(TORCH)' bash scripts/check_wheel.sh

# The page of `plop report` in a browser: accessibility, width and size of text. Needs Node; installs Chromium on Debian.
page-test: setup
	BIN=$(BIN) bash scripts/check_page.sh

# Tests of the quantization libraries, which this installs into .venv; without them `make test` skips those.
quantized-test: setup
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[quantized]'
	$(BIN)/python -m pytest tests/layers/test_quantized.py tests/models tests/streaming/test_quantized.py

# Scores in TRL's and Lightning's trainers, and token ids as TRL prepares them; installs both into .venv. Without them
# `make test` skips these.
trl-test: setup
	$(BIN)/pip install --quiet 'trl==1.16.0' 'lightning==2.6.6'
	$(BIN)/python -m pytest tests/data/test_trl.py tests/integrations/test_trl.py tests/integrations/test_lightning.py

# Scores under DeepSpeed's ZeRO-3, unpacked into build/zero, because trainers take another path where it is installed.
# Without it `make test` skips these.
zero-test: setup
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --no-deps --no-build-isolation --upgrade --target build/zero 'deepspeed==0.19.8' 'hjson==3.1.0' 'py-cpuinfo==9.0.0' 'msgpack==1.2.4' 'einops==0.8.2'
	DS_ACCELERATOR=cpu PYTHONPATH=build/zero $(BIN)/python -m pytest tests/distributed/test_zero.py

# The scripts and the notebook of examples/, which need TRL, Lightning and Jupyter; installs these into .venv.
examples-test: setup
	$(BIN)/pip install --quiet 'trl==1.16.0' 'lightning==2.6.6' nbclient nbformat ipykernel
	$(BIN)/python -m pytest -m '' tests/examples

# The oldest releases of transformers, PEFT, accelerate, datasets and TRL that are supported, in an environment of its own.
oldest-test: setup
	PYTHON=$(PYTHON) OLDEST=$(VENV)-oldest TORCH='$(TORCH)' bash scripts/check_oldest.sh

# Exports of placements, applied by the training stacks' own code; unpacks them into build/stacks, 0.4 GB.
stacks-test: setup build/stacks/.unpacked
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m stacks tests/stacks

build/stacks/.unpacked: scripts/install_stacks.sh
	BIN=$(BIN) bash scripts/install_stacks.sh build/stacks
	touch $@

# Breaks the code of a room in one place at a time, and prints every change that no test notices. About 40 minutes on two
# cores for a room; ROOM=statistics.curve is one file.
ROOM ?= statistics
mutants: setup
	$(BIN)/pip install --quiet --no-build-isolation --editable '.[mutation]'
	rm -f mutants/mutmut-stats.json
	OMP_NUM_THREADS=1 $(BIN)/mutmut run --max-children 2 'plop_ext.$(ROOM).*'
	$(BIN)/mutmut results | sed -n 's/^ *\(plop_ext\.$(ROOM)\..*\): \(survived\|no tests\|timeout\|suspicious\)$$/\1/p' \
	  | xargs -rn1 $(BIN)/mutmut show

gpu-test:
	$(PYTHON) setup.py --quiet build_ext --inplace
	PLOP_REQUIRE_CUDA=1 $(PYTHON) -m pytest -m gpu

# Memory errors and races in the kernels; slow, so only the tests that launch each kernel once per shape. Without torch's
# cache every tensor is an allocation of its own, whose end memcheck knows.
SANITIZE := tests/ops/test_row_sumsq.py tests/ops/test_row_sumsq_pair.py tests/ops/test_gain_totals.py tests/ops/test_groups.py \
  tests/ops/test_fused.py tests/ops/test_gated_projection.py -m gpu -k 'equals_t or equal_the or exact_products or step_and_phase or layout'
gpu-sanitize:
	for tool in memcheck racecheck; do \
	  PYTORCH_NO_CUDA_MEMORY_CACHING=1 PLOP_REQUIRE_CUDA=1 compute-sanitizer --tool $$tool --error-exitcode 9 $(PYTHON) -m pytest $(SANITIZE) || exit 1; \
	done

# The GPU figures of the README, about half an hour and 26 GB of disk on one GPU.
gpu-bench:
	$(PYTHON) -m benchmarks.kernel_bandwidth --output benchmarks/results/kernel_bandwidth.json
	$(PYTHON) -m benchmarks.fused_kernels --output benchmarks/results/fused_kernels.json
	$(PYTHON) -m benchmarks.gated_projection --output benchmarks/results/gated_projection.json
	$(PYTHON) -m benchmarks.model_forward --whole-model-compile llama-3.1-8b --output benchmarks/results/model_forward.json
	$(PYTHON) -m benchmarks.plot_model_forward benchmarks/results/model_forward.json --output docs/model_forward.svg
	$(PYTHON) -m benchmarks.scoring_overhead --output benchmarks/results/scoring_overhead.json
	$(PYTHON) -m benchmarks.adapter_cost --output benchmarks/results/adapter_cost.json
	$(PYTHON) -m benchmarks.training_overhead --output benchmarks/results/training_overhead.json
	$(PYTHON) -m benchmarks.streaming --output benchmarks/results/streaming.json
	$(PYTHON) -m benchmarks.moe_overhead --output benchmarks/results/moe_overhead.json
	$(PYTHON) -m benchmarks.time_to_placement --output benchmarks/results/time_to_placement.json
	$(PYTHON) -m benchmarks.whole_api --output benchmarks/results/whole_api.json
	$(PYTHON) -m benchmarks.first_seconds --output benchmarks/results/first_seconds.json
	$(PYTHON) -m benchmarks.plot_first_seconds benchmarks/results/first_seconds.json --output docs/first_seconds.svg

# What Nsight Compute sees of each kernel, at the clocks of a run.
gpu-profile:
	ncu --clock-control none --print-units base --csv \
	  --kernel-name 'regex:row_sumsq|gain_totals|add_rms_norm|gated_activation|gated_projection|rotary' \
	  --metrics "$$($(PYTHON) -m benchmarks.profile_kernels --metrics)" \
	  $(PYTHON) -m benchmarks.profile_kernels > benchmarks/results/ncu.csv
	$(PYTHON) -m benchmarks.profile_kernels --read benchmarks/results/ncu.csv \
	  --output benchmarks/results/profile_kernels.json

clean:
	rm -rf build dist *.egg-info plop_ext/*.so $(VENV)/.native
