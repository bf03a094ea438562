# One command each; every target does its own set-up.
#   make demo   train a small GPT on mps (a Mac's GPU, or the simulated device on Linux)
#   make test   the suite, but for long sweeps (ARGS="-m slow"); on a Mac what is not Linux-only (tests/rooms.py)
#   make quick  a part of it that takes a minute and a half, for the loop of work
#   make clients  every cell of docs/transformers-matrix.md, and writes it
#   make versions  what needs no mps device, on the oldest and the newest torch
#   make docs   the site, in build/docs/index.html
#   make bench  time and memory beside SDPA, on a Mac's GPU or on the CPU
#   make wheel  the macOS wheel, in dist/ (cross-built on Linux)
#   make sdist  the source distribution, in dist/
#   make hub-kernel  what Hugging Face's `kernels` loads, in build/hub-kernel
#   make abi    which torch releases that wheel's library loads into, and why
# The instruments of docs/proof.md; what is fast enough is part of `make test`:
#   make engine | dialect | mutants | nvidia | inductor | faults | fuzz | selftest | model | memory
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
PY := $(VENV)/bin/python
NATIVE := build/native/liborchard_ops.so
SYSTEM := $(shell uname -s)

PIP := $(PY) -m pip install --quiet --disable-pip-version-check

ifeq ($(SYSTEM),Darwin)
CPU_BUILD :=
CPU_INDEX :=
ON_MPS := $(PY)
PLUGIN := src/orchard_ops/liborchard_ops.dylib
DEVICE :=
WHEEL := -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir dist .
else
CPU_BUILD := +cpu
CPU_INDEX := --extra-index-url https://download.pytorch.org/whl/cpu --retries 0 --timeout 10
# The simulated mps device; it needs clang-19 to execute the kernels.
ON_MPS := ORCHARD_NATIVE_LIBRARY=$(CURDIR)/$(NATIVE) $(PY) -m simulator
PLUGIN := $(NATIVE)
DEVICE := device
WHEEL := tools/macos/pack_wheel.py
endif

.PHONY: demo test quick clients versions docs bench memory lint format native wheel sdist hub-kernel abi tools clean
.PHONY: device engine dialect mutants nvidia inductor faults fuzz selftest model
.DELETE_ON_ERROR:

ifeq ($(SYSTEM),Darwin)
demo: $(VENV)/ready $(PLUGIN)
	$(PY) -m orchard_ops demo $(ARGS)

bench: $(PLUGIN)
else
demo: $(VENV)/ready
	@if sh tools/system_tools.sh; then \
	  $(MAKE) --no-print-directory $(PLUGIN) && $(ON_MPS) -m orchard_ops demo $(ARGS); \
	else \
	  echo "Without a simulated device the demo runs the reference kernels on the CPU."; \
	  $(PY) -m orchard_ops demo $(ARGS); \
	fi
endif

bench: $(VENV)/ready
	$(PY) -m orchard_ops bench $(ARGS)

memory: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m benchmarks.memory $(ARGS)

test: $(VENV)/dev tools
	@$(MAKE) --no-print-directory -j 2 lint $(DEVICE) $(PLUGIN)
	$(PY) -m pytest -n 2 --dist worksteal -m "not slow" --durations=30 $(ARGS)

quick: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m pytest -q -n 2 --dist worksteal --quick -m "not slow" $(ARGS)

clients: $(VENV)/dev tools $(PLUGIN)
	$(PY) tools/transformers_matrix.py $(ARGS)
	$(PY) -m pytest -q -m "slow or not slow" tests/clients

# Throwaway environments: $(VENV) keeps the torch that everything else is checked with.
versions:
	$(PYTHON) tools/torch_versions.py $(ARGS)

# A warning is an error: a dead link, a page that is in no list, a docstring that does not parse.
docs: $(VENV)/dev
	$(PY) -m sphinx -E -W --keep-going -q -b html docs build/docs $(ARGS)

engine: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m pytest -n 2 --dist worksteal tests/simulator/test_engine*.py $(ARGS)

dialect: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m pytest tests/proof/test_shader_dialect.py $(ARGS)

mutants: $(VENV)/dev tools $(PLUGIN)
	PYTHONPATH=tests/proof $(PY) -m mutation $(ARGS)

nvidia: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m benchmarks.nvidia.build $(ARGS)

inductor: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m pytest tests/attention/test_compiled_training.py $(ARGS)

faults: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m pytest -n 2 tests/attention/test_fallback.py tests/attention/test_robustness.py $(ARGS)

fuzz: $(VENV)/dev tools $(PLUGIN)
	PYTHONPATH=tests/proof ORCHARD_NATIVE_LIBRARY=$(CURDIR)/$(NATIVE) $(PY) -m fuzz $(ARGS)

# Predicted speed on Apple GPUs (docs/apple-model.md); refreshes benchmarks/results/apple_model.
model: $(VENV)/dev tools $(PLUGIN)
	$(PY) -m benchmarks.apple_model $(ARGS)

selftest: $(VENV)/ready tools $(PLUGIN)
	$(ON_MPS) -m orchard_ops selftest $(ARGS)

lint: $(VENV)/dev
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	git ls-files '*.h' '*.cpp' | xargs $(VENV)/bin/clang-format --dry-run --Werror

format: $(VENV)/dev
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .
	git ls-files '*.h' '*.cpp' | xargs $(VENV)/bin/clang-format -i

native: $(PLUGIN)

# The simulated device itself, which the first test would wait for.
device: $(VENV)/ready tools
	$(PY) -c "from simulator import build; build.device_library()"

# For the simulated device on Linux, or for the package itself on a Mac: what is edited is what runs.
$(PLUGIN): $(shell find native shaders -name '*.h' -o -name '*.cpp' -o -name '*.py') $(VENV)/ready
	$(PY) native/build.py $@

wheel: $(VENV)/dev tools
	$(PY) $(WHEEL)

# With the setuptools of PYTHON: nothing is compiled, and torch is not needed.
sdist:
	$(PYTHON) -c "import setuptools.build_meta as backend; print(backend.build_sdist('dist'))"

hub-kernel: $(VENV)/dev tools
	$(PY) tools/hub_kernel.py $(ARGS)

abi: $(VENV)/dev tools
	$(PY) tools/macos/abi_check.py

tools:
	sh tools/system_tools.sh

# What the demo needs. On Linux PyTorch's own index has the CPU build, without gigabytes of CUDA; where
# it cannot be reached, the default index must do.
$(VENV)/ready: pyproject.toml setup.py
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "orchard_ops needs Python 3.11 or later; set PYTHON=...")'
	$(PYTHON) -m venv $(VENV)
	$(PIP) "setuptools>=77" "$(TORCH)$(CPU_BUILD)" $(CPU_INDEX) 2>/dev/null || $(PIP) "setuptools>=77" "$(TORCH)"
	$(PIP) --no-build-isolation -e ".[demo]"
	$(PY) -c 'import pathlib, sysconfig; pathlib.Path(sysconfig.get_path("purelib"), "orchard_checkout.pth").write_text("$(CURDIR)\n")'
	touch $@

# What the suite and the linters need besides.
$(VENV)/dev: $(VENV)/ready
	$(PIP) --no-build-isolation -e ".[dev]"
	touch $@

clean:
	rm -rf build dist $(VENV) demo-output
