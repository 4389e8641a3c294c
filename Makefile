# One command per situation. `./setup` brings what is missing; REFOCUS_TORCH_ROOT points at an installed torch 2.11.
BUILD := build/release
CONFIGURE := $(if $(REFOCUS_TORCH_ROOT),-DREFOCUS_TORCH_ROOT=$(REFOCUS_TORCH_ROOT))
JOBS ?= $(shell nproc)

.DEFAULT_GOAL := help
.PHONY: help setup build build-all demo test test-all asan tsan bench clean

help:
	@echo "make demo      read a novel on two ranks, adapt to it, ask it a question (sets everything up)"
	@echo "make test      set up, build, run the fast tests"
	@echo "make test-all  also the slow ones"
	@echo "make build     set up and build build/release/bin/{refocus,refocus-coordinator,refocus-worker}"
	@echo "make asan      the fast tests under AddressSanitizer and UBSan;  make tsan: under ThreadSanitizer"
	@echo "make bench     the benches"
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
	@ctest --test-dir $(BUILD) --output-on-failure -LE slow

test-all: build-all
	@ctest --test-dir $(BUILD) --output-on-failure

asan tsan: setup
	@cmake --preset $@ $(CONFIGURE)
	@cmake --build build/$@ -j $(JOBS)
	@ctest --test-dir build/$@ --output-on-failure -L fast

bench: build-all
	@ls $(BUILD)/bin | grep bench || echo "no benches are built"

clean:
	rm -rf build
