# make repro: the whole pipeline. make test: the tests. make test-gpu: those that need a GPU. make check: what CI checks.
# Paths are relative, so that the project's folder may have spaces, quotes and any letters in its name.
SHELL := /bin/bash
PYTHON ?= python3
export PATH := $(CURDIR)/.venv/bin:$(PATH)
export DVC_NO_ANALYTICS := true

.PHONY: repro pull test test-gpu check table schema format

repro: .venv/installed
	@python -m stages check
	@set -o pipefail; dvc repro | sed -u $(HIDDEN_ADVICE)
	@python -m stages check
	@echo
	@echo "models/merged          the fine-tuned model, a Hugging Face folder"
	@echo "models/adapter         the LoRA adapter alone"
	@echo "reports/report.html    the report: open it in a browser"
	@echo "reports/masks.html     training rows with the tokens in the loss marked"
	@echo "make table             this run next to others"

# In a fresh clone: what dvc push has put into the remote. The merged model is not there, since merge makes it again.
pull: .venv/installed
	dvc pull --allow-missing
	@test -e models/merged || echo "models/merged is in no remote: make repro makes it again, and runs no other stage"

# DVC's advice on settings and remotes that the project does not use.
HIDDEN_ADVICE := -e '/^Use .dvc push. to send/d' -e '/^To enable auto staging/,/core.autostage/d'

test: .venv/installed
	python -m pytest

# tests/conftest.py hides the GPU; it is not read here.
test-gpu: .venv/installed
	python -m pytest --confcutdir=tests/gpu --durations=10 tests/gpu

check: .venv/installed
	ruff format --check .
	ruff check .
	mypy
	python -m pytest

table: .venv/installed
	@COLUMNS=200 dvc exp show --no-pager --only-changed --drop '(stages|data|models|reports)/.*' --keep '(rows|tokens|loss|loss_base|merge_kl|quantization_cost|em_.*|calls_.*|perplexity.*)'

schema: .venv/installed
	python tools/params_schema.py

format: .venv/installed
	ruff format .
	ruff check --fix .

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Loratory needs Python 3.11 or 3.12: make PYTHON=python3.12")'
	test -x .venv/bin/python || $(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
