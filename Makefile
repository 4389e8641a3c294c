# One command per situation. `./setup` brings what is missing; REFOCUS_TORCH_ROOT points at an installed torch 2.11.
BUILD := build/release
# Always said: a path that an earlier call left in CMake's cache would stay otherwise.
CONFIGURE := -DREFOCUS_TORCH_ROOT=$(or $(REFOCUS_TORCH_ROOT),$(CURDIR)/.deps/site/torch)
JOBS ?= $(shell nproc)
# Two at a time: tests that compute on all cores, or measure time, are marked to run alone; others mostly wait.
CTEST := ctest --output-on-failure -j 2 --test-dir

.DEFAULT_GOAL := help
.PHONY: help setup build build-all demo demo-novel test test-all asan tsan cuda bench bundle clean

help:
	@echo "make demo      look values up in ledgers, before and after adapting (sets up what it needs)"
	@echo "make demo-novel  read a novel on two ranks, adapt to it, ask it a question"
	@echo "make test      set up, build, run the fast tests"
	@echo "make test-all  also the slow ones"
	@echo "make build     set up and build build/release/bin/{refocus,refocus-coordinator,refocus-worker}"
	@echo "make asan      the fast tests under AddressSanitizer and UBSan;  make tsan: under ThreadSanitizer"
	@echo "make cuda      what needs nvcc: the CUDA backend and its tests and benches (they run where there is a GPU)"
	@echo "make bench     attention, tokenizer, and a whole context on one rank and on two: tables, about 5 minutes on 2 cores"
	@echo "make bundle    build/refocus-bundle.tar.gz: the programs for other machines, with CUDA where nvcc is (PRESET=release: without)"
	@echo "make clean     remove build/ (what was fetched stays in .deps/)"

setup:
	@./setup

define build_programs
@cmake --preset release $(CONFIGURE)
@cmake --build $(BUILD) -j $(JOBS) --target refocus refocus-coordinator refocus-worker
endef

build: setup
	$(build_programs)

# Needs neither the model nor the novels that ./setup fetches.
demo:
	@./setup --no-data
	$(build_programs)
	@$(MAKE) --no-print-directory --silent build/python/.made
	@PYTHONPATH=$(CURDIR)/build/python:$(CURDIR)/.deps/python ./deploy/demo.sh $(BUILD)/bin build/demo

build/python/.made: $(shell find python proto -type f -not -name '*.pyc')
	@PYTHONPATH=$(CURDIR)/.deps/python python3 -B deploy/python_package.py . build/python
	@touch $@

demo-novel: build
	@./deploy/demo_novel.sh $(BUILD)/bin

build-all: setup
	@cmake --preset release $(CONFIGURE)
	@cmake --build $(BUILD) -j $(JOBS)

test: build-all
	@$(CTEST) $(BUILD) -LE slow

test-all: build-all
	@$(CTEST) $(BUILD)

asan tsan: setup
	@cmake --preset $@ $(CONFIGURE)
	@cmake --build build/$@ -j $(JOBS) --target fast_tests
	@$(CTEST) build/$@ -L fast

cuda: setup
	@cmake --preset cuda $(CONFIGURE)
	@cmake --build build/cuda -j $(JOBS) --target cuda_targets

bench: setup
	@cmake --preset release $(CONFIGURE) -DREFOCUS_BENCH=ON
	@cmake --build $(BUILD) -j $(JOBS) --target attention_bench context_bench tokenizer_bench
	@./deploy/bench.sh $(BUILD)/bin

# The archive's folder is refocus/; what is in it does not name this machine.
PRESET ?= $(if $(or $(wildcard /usr/local/cuda/bin/nvcc),$(shell command -v nvcc)),cuda,release)
bundle: setup
	@cmake --preset $(PRESET) $(CONFIGURE)
	@cmake --build build/$(PRESET) -j $(JOBS) --target refocus refocus-coordinator refocus-worker
	@rm -rf build/bundle
	@cmake --install build/$(PRESET) --prefix build/bundle/refocus >/dev/null
	@tar -C build/bundle --owner=0 --group=0 --numeric-owner -czf build/refocus-bundle.tar.gz refocus
	@ls -l build/refocus-bundle.tar.gz

clean:
	rm -rf build
