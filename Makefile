# `make demo` and `make test` set up all that they need. With a virtual environment active they use it, else they make
# .venv; a torch that is there already is used as it is.
#
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu     a small torch without CUDA
#   make test TORCH=torch==2.10.0                                  another torch

PYTHON ?= python3
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
BUILD_TYPE ?= Release

ifdef VIRTUAL_ENV
ENV := $(VIRTUAL_ENV)
else
ENV := .venv
endif
PY := $(ENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMP := $(ENV)/.bitinfer-$(shell pwd | cksum | cut -d' ' -f1)
NATIVE := setup.py pyproject.toml CMakeLists.txt $(shell find csrc -type f 2>/dev/null)

# pip keeps the build's own warning to itself
SAY_WHAT_IS_MISSING = $(PY) -c 'import json; r = json.load(open("bitinfer/_build.json")); \
    r["native"] or print("note: without compiled kernels, hence slow:", r["native_reason"])'

.DEFAULT_GOAL := help
.PHONY: help demo test lint cpp-test py-test bench clean

help:  ## Show the targets
	@grep -E '^[a-z-]+:.*##' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

demo: $(STAMP)-demo  ## Set up, and let the binary language model that comes with bitinfer write
	$(PY) examples/demo.py

test: lint cpp-test py-test  ## Set up and run every check and test

lint: $(STAMP)-test  ## Style and types
	PATH="$(abspath $(ENV))/bin:$$PATH" $(PY) -m pre_commit run --all-files

cpp-test: $(STAMP)-test  ## C++ tests under the address and undefined-behaviour sanitizers
	PATH="$(abspath $(ENV))/bin:$$PATH" cmake -S . -B build/sanitize -G Ninja -DCMAKE_BUILD_TYPE=RelWithDebInfo \
	    -DBITINFER_SANITIZE=ON -DBITINFER_TESTS=ON -DBITINFER_TORCH=OFF -DBITINFER_PYTHON=OFF -DBITINFER_CUDA=OFF
	PATH="$(abspath $(ENV))/bin:$$PATH" cmake --build build/sanitize
	PATH="$(abspath $(ENV))/bin:$$PATH" ctest --test-dir build/sanitize --output-on-failure

py-test: $(STAMP)-test  ## Python tests
	$(PY) -m pytest -n 2 --dist loadfile

bench: $(STAMP)-test  ## Time the kernels of this machine
	$(PY) -m bitinfer.cli bench kernels

clean:  ## Remove what was built here, the environment included
	rm -rf .venv build dist .demo bitinfer/*.so bitinfer/_build.json *.egg-info

$(STAMP)-torch:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo "bitinfer needs Python 3.10 or newer; say which one with: make PYTHON=python3.11"; exit 1; }
	@# an environment of ours sees the machine's own packages only if a usable torch is among them
	@test -x $(PY) || { \
	    site=$$($(PYTHON) -c 'import torch; v = torch.__version__.split("."); \
	        print("--system-site-packages" if (int(v[0]), int(v[1])) >= (2, 10) else "")' 2>/dev/null || true); \
	    $(PYTHON) -m venv $$site $(ENV) || \
	    { echo "cannot make a virtual environment; on Debian: apt-get install python3-venv"; rm -rf $(ENV); exit 1; }; }
	@# torch 2.11 asks for a setuptools below 82
	$(PIP) install --quiet "setuptools>=77,<82" wheel "cmake>=3.25" ninja "pybind11>=2.13" numpy
	@$(PY) -c 'import torch' 2>/dev/null || { echo "installing $(TORCH)"; \
	    $(PIP) install --quiet "$(TORCH)" $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)); }
	@touch $@

$(STAMP)-demo: $(STAMP)-torch $(NATIVE)
	$(PIP) install --quiet --no-build-isolation --editable .
	@$(SAY_WHAT_IS_MISSING)
	@touch $@

$(STAMP)-test: $(STAMP)-torch $(NATIVE)
	$(PIP) install --quiet --no-build-isolation --editable ".[test,lint]"
	@# a torch with CUDA, ROCm or XPU brings its own
	@$(PY) -c 'import triton' 2>/dev/null || $(PIP) install --quiet "triton>=3.6,<3.7" || \
	    echo "note: there is no Triton for this machine, so its kernels are not tested"
	@$(SAY_WHAT_IS_MISSING)
	@touch $@
