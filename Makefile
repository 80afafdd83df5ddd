# make reproduce   the whole paper in small, on the built-in tissue: some minutes on two CPU cores
# make install     the environment alone
# make test        the whole test suite, the five notebooks included
# make readme      the tables in README.md, docs/runs.md and docs/results.md, from tables/*/results.csv
# make gpu         with a CUDA device, 10 minutes: the tests marked gpu, then rates beside their peers, into OUT=FOLDER;
#                  without a network: tests/bench/gpu.sh, which says how
# make lint        ruff over modules, tests and notebooks; the CI runs it too
# Each first makes its own virtual environment in .venv and installs nucseg there.

PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
OUT    ?= gpu-rates

.PHONY: reproduce install test readme gpu lint clean
.DEFAULT_GOAL := reproduce

$(VENV)/installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
	  echo "nucseg needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1)."; \
	  echo "Name another one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { \
	  echo "This Python cannot make virtual environments; on Debian and Ubuntu: apt-get install python3-venv"; exit 1; }
	@echo "Installing nucseg and its dependencies into $(VENV) (some minutes, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[slides]'
	@touch $@

$(VENV)/tests-installed: $(VENV)/installed
	@echo "Installing what only the tests need ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	@touch $@

install: $(VENV)/installed

reproduce: $(VENV)/installed
	@$(BIN)/nucseg reproduce --profile sample

test: $(VENV)/tests-installed
	$(BIN)/python -m pytest -n 2 --dist loadfile
	$(BIN)/python -m pytest --nbval-lax --nbval-current-env --nbval-cell-timeout 900 -W default notebooks

readme: $(VENV)/installed
	$(BIN)/python -m nucseg.tables.summary README.md docs/runs.md
	$(BIN)/python -m nucseg.tables.reading docs/results.md

gpu: $(VENV)/tests-installed
	PYTHON=$(abspath $(BIN))/python bash tests/bench/gpu.sh $(abspath $(OUT))

lint: $(VENV)/tests-installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) runs .pytest_cache .ruff_cache
