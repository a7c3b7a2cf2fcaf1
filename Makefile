# klein: `make serve` and `make test` are all a newcomer needs.

PYTHON ?= python3.11
PORT ?= 3000
VENV := .venv
BIN := $(VENV)/bin
export BENTOML_DO_NOT_TRACK := 1

.PHONY: help serve test check lint bench bundle pictures screenshots test-page docs clean

help:
	@echo "make serve   set up, then serve MODEL_ID (nano unless set) on PORT ($(PORT))"
	@echo "make test    set up, then run the tests"
	@echo "make test-page   try the page in Chromium (apt-get install chromium; CHROMIUM=… for another path)"
	@echo "make check   ruff, mypy, the import layers and the tests: what CI runs"
	@echo "make bench   seconds a picture by stock diffusers and each tier, and the service's share"
	@echo "make bundle  build the image with Docker and run both of its lives (minutes)"
	@echo "make clean   remove the environment"

serve: $(VENV)/.serve
	MODEL_ID=$${MODEL_ID:-nano} $(BIN)/bentoml serve service:Klein --port $(PORT)

test: $(VENV)/.test
	$(BIN)/python -m pytest tests/unit tests/doors
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal tests/model tests/bundle

# needs a Chromium: apt-get install chromium
test-page: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile tests/page

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

check: lint test

# BUNDLE="--image klein:local" tries an image that is there already; see tests/bundle/image.py
bundle: $(VENV)/.test
	$(BIN)/python -m tests.bundle.image $(BUNDLE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(VENV)/.serve: requirements.txt | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

$(VENV)/.test: requirements-dev.txt $(VENV)/.serve
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@

# stock diffusers and the tiers side by side, then what the service costs over the bare call
bench: $(VENV)/.serve
	$(BIN)/python -m benchmarks.tiers
	$(BIN)/python -m benchmarks.service

# the tables and plots of the pages, made anew from the code and from SPEED.md
docs: $(VENV)/.test
	$(BIN)/python -m docs.plots
	$(BIN)/python -m tests.support.docs --write

pictures: $(VENV)/.serve
	MODEL_ID=nano $(BIN)/python -m docs.pictures

# the page's screenshots in docs/images; needs a Chromium
screenshots: $(VENV)/.test
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.page.screenshots

clean:
	rm -rf $(VENV)
