# `make demo` and `make test` each start from nothing; they need Python >= 3.10 (PYTHON=python3.11 chooses one) and a
# package index. VISBIO_DATA names the folder of the real data, without which the tests that need it are skipped.
PYTHON ?= python3
BIN = .venv/bin
INSTALLED = .venv/.installed

.PHONY: demo test test-all style quality

demo: $(INSTALLED)
	mkdir -p demo
	$(BIN)/visbio generate --dataset bloodmnist --per-class 4 --format grid --output demo/blood-cells.png

test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist worksteal

test-all: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -n 2 --dist worksteal -m ""

style: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

quality: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[train,pubmed,demo,notebooks,test,dev]"
	touch $@
