# make repro: the whole pipeline. make test: the tests. make check: what CI checks.
PYTHON ?= python3
BIN := $(CURDIR)/.venv/bin
export PATH := $(BIN):$(PATH)
export DVC_NO_ANALYTICS := true

.PHONY: repro test check table format

repro: .venv/installed
	@dvc status -q || python -m stages check
	dvc repro
	@echo
	@echo "models/merged          the fine-tuned model, a Hugging Face folder"
	@echo "models/adapter         the LoRA adapter alone"
	@echo "reports/report.html    the report: open it in a browser"
	@echo "reports/masks.html     training rows with what is learned in marks"
	@echo "make table             this run beside others"

test: .venv/installed
	python -m pytest

check: .venv/installed
	ruff format --check .
	ruff check .
	mypy
	python -m pytest

table: .venv/installed
	@COLUMNS=200 dvc exp show --no-pager --only-changed --drop '(stages|data|models|reports)/.*' --keep '(rows|tokens|loss|loss_base|merge_kl|em_.*)'

format: .venv/installed
	ruff format .
	ruff check --fix .

.venv/installed: requirements.txt constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)) and "Loratory needs Python 3.11 or 3.12: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt -c constraints.txt
	touch $@
