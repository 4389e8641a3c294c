# One command per situation. `./setup` brings what is missing; REFOCUS_TORCH_ROOT points at an installed torch 2.11.
BUILD := build/release
# Always said: a path that an earlier call left in CMake's cache would stay otherwise.
CONFIGURE := -DREFOCUS_TORCH_ROOT=$(or $(REFOCUS_TORCH_ROOT),$(CURDIR)/.deps/site/torch)
JOBS ?= $(shell nproc)
# Two at a time: tests that compute on all cores, or measure time, are marked to run alone; others mostly wait.
CTEST := ctest --output-on-failure -j 2 --test-dir

.DEFAULT_GOAL := help
.PHONY: help setup build build-all demo test test-all asan tsan bench clean

help:
	@echo "make demo      read a novel on two ranks, adapt to it, ask it a question (sets everything up)"
	@echo "make test      set up, build, run the fast tests"
	@echo "make test-all  also the slow ones"
	@echo "make build     set up and build build/release/bin/{refocus,refocus-coordinator,refocus-worker}"
	@echo "make asan      the fast tests under AddressSanitizer and UBSan;  make tsan: under ThreadSanitizer"
	@echo "make bench     attention, tokenizer, and a whole context on one rank and on two: tables, about 5 minutes on 2 cores"
	@echo "make clean     remove build/ (what was fetched stays in .deps/)"

setup:
	@./setup

build: setup
	@cmake --preset release $(CONFIGURE)
	@cmake --build $(BUILD) -j $(JOBS) --target refocus refocus-coordinator refocus-worker

demo: build
	@./deploy/demo.sh $(BUILD)/bin

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

bench: setup
	@cmake --preset release $(CONFIGURE) -DREFOCUS_BENCH=ON
	@cmake --build $(BUILD) -j $(JOBS) --target attention_bench context_bench tokenizer_bench
	@./deploy/bench.sh $(BUILD)/bin

clean:
	rm -rf build
