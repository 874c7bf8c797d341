# Each job makes this machine ready first (tools/setup), then does its work; a second run is quick.

.PHONY: help demo test bench setup clean

help:
	@echo "make demo    boot the example's machines and run its tests in them"
	@echo "             STANDIN=1 or NIXPKGS=REF decide which nixpkgs they are made of"
	@echo "make test    what CI runs: lint, types, unit tests, some also on Python 3.13, VM tests"
	@echo "make bench   figures, side by side with their limits; on a quiet machine"
	@echo "make setup   only what both need: system packages and .venv"
	@echo "make clean   remove .venv and what tools leave behind"

demo:
	@NIXPKGS='$(NIXPKGS)' STANDIN='$(STANDIN)' tools/setup demo tools/demo

test:
	@tools/setup test tools/test

bench:
	@tools/setup test
	@.venv/bin/tox run -qq -e bench

setup:
	@tools/setup test

clean:
	rm -rf .venv .tox .mypy_cache .ruff_cache .pytest_cache example_tests/.pytest_cache dist build
