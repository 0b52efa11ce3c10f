# Everything runs in one virtual environment, made on first use.
#   make demo   private training on the embedded digits: accuracy, epsilon, report and plot in dpdl-demo/
#   make test   lint, types, tests
#   make slow   the tests that take minutes
#   make docs   the documentation as a site, in docs/_build/html; a warning is an error

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
STAMP := $(VENV)/.installed
EXTRAS := demo,images,completion,test,lint,build,docs

# Tests run in parallel processes; threads on top of them only get in each other's way.
export OMP_NUM_THREADS ?= 1

.PHONY: demo test lint types tests slow docs wheel clean

demo: $(STAMP)
	rm -rf dpdl-demo
	OMP_NUM_THREADS=$(WORKERS) $(BIN)/dpdl train --output dpdl-demo

test: lint types tests

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

tests: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations=10

slow: $(STAMP)
	$(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal -m slow

docs: $(STAMP)
	rm -rf docs/_build
	$(BIN)/python -m sphinx -q -W --keep-going -b html docs docs/_build/html

wheel: $(STAMP)
	rm -rf dist
	$(BIN)/python -m build --wheel --outdir dist .

$(STAMP): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(EXTRAS)]'
	touch $(STAMP)

clean:
	rm -rf $(VENV) build dist *.egg-info dpdl-demo docs/_build
