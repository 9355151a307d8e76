# The front door: `make` lists what there is. Each target is one line of script; what it does is said there.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
MAKEFLAGS += --no-print-directory

# Tools that `make setup` installed are found through this.
ENV := . scripts/lib.sh;

# Arguments for the program behind a target: make demo ARGS="..."
ARGS ?=

.PHONY: help setup setup-build build demo test bench fmt lint deny vm dist e2e image docs clean

help: ## Show this list
	@sed -n 's/^\([a-z0-9-]*\):[^#]*## \(.*\)/  make \1\t\2/p' Makefile | expand -t 18

setup: ## Install everything that building and testing need (Debian 12/13, Ubuntu 22.04+)
	@scripts/setup.sh all

setup-build:
	@scripts/setup.sh build

build: setup-build ## Build the programs for this machine, optimised, into target/release/
	$(ENV) cargo build --release --bins -p ec-node-agent -p ec-aggregator -p ec-operator

demo: setup-build ## Watch this machine's traffic for 20 s, delivered to a DataWay stub (needs root or sudo)
	@$(ENV) cargo xtask demo $(ARGS)

test: setup ## Run every test tier; `make test ARGS="unit vm"` runs some
	@scripts/test.sh $(ARGS)

bench: setup ## Measure speed and memory, with and without the agent (needs root or sudo)
	@$(ENV) cargo xtask bench $(ARGS)

fmt: ## Format all code
	$(ENV) cargo fmt --all

lint: setup-build ## Check format and lints
	$(ENV) cargo fmt --all --check
	$(ENV) cargo clippy --workspace --all-targets -- -D warnings

deny: setup ## Check licences, sources and known vulnerabilities of what we depend on
	@scripts/test.sh deny

vm: setup ## Run a program on every kernel: make vm ARGS="-- target/release/node-agent doctor"
	@$(ENV) cargo xtask vm $(ARGS)

dist: setup-build ## Build the static programs into dist/
	@$(ENV) cargo xtask dist $(ARGS)

e2e: setup ## Run the tests on a whole cluster (needs root or sudo); `make e2e ARGS="--only names"` runs some
	@scripts/e2e.sh all $(ARGS)

image: setup dist ## Build the image from dist/ and run it
	@scripts/image.sh

docs: setup-build ## Build the API documentation into target/doc/
	$(ENV) RUSTDOCFLAGS="-D warnings" cargo doc --workspace --no-deps --document-private-items

clean: ## Remove everything built here (the cache of `make setup` stays)
	$(ENV) cargo clean
	rm -rf dist
