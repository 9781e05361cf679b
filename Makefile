# One screen: everything creates what it needs.
PYTHON ?= $(or $(shell command -v python3.11),python3)
BIN := .venv/bin
STAMP := .venv/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)
STEPS ?= 100
export HF_HUB_DISABLE_TELEMETRY := 1

.DEFAULT_GOAL := help
.PHONY: help setup repro test test-slow lint types schema mixers-queue mixers-report clean

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  *##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

setup: $(STAMP)  ## .venv with the pinned dependencies

repro: $(STAMP)  ## the whole pipeline on the embedded sample (or whatever params.yaml says)
	dvc repro

test: $(STAMP)   ## lint, types and the tests
	ruff check .
	ruff format --check .
	mypy
	python -m pytest -m 'not slow'

test-slow: $(STAMP)  ## the tests that run the whole pipeline in clean clones
	python -m pytest -m slow

lint: $(STAMP)   ## ruff, fixing what it can
	ruff check --fix .
	ruff format .

types: $(STAMP)  ## mypy
	mypy

schema: $(STAMP) ## write schema/params.schema.yaml from the options classes
	python -m frankenstein.schema schema/params.schema.yaml

mixers-queue: $(STAMP)  ## train each mixer on the sample, one experiment each
	python -m benchmarks.mixers_on_sample queue --steps $(STEPS)
	dvc exp run --run-all

mixers-report: $(STAMP) ## table and picture of those experiments
	python -m benchmarks.mixers_on_sample report

clean:           ## remove artifacts and caches; keep .venv
	rm -rf data/cache data/tokenizer data/tokens data/encoder data/quantized data/sbert data/embeddings data/.resume data/.compiled data/race reports/logs
