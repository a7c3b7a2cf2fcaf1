# klein: `make serve` and `make test` are all a newcomer needs.

PYTHON ?= python3.11
PORT ?= 3000
VENV := .venv
BIN := $(VENV)/bin
# Bytecode is made when a module is first imported: most of what is installed never is.
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile
RUFF := $(BIN)/ruff
# Tests that need torch (tests/conftest.py has the same names); the other folders run without it.
HEAVY := model bundle gpu page monitoring ray
LIGHT := $(filter-out $(HEAVY:%=tests/%/),$(sort $(dir $(wildcard tests/*/test_*.py))))
# Processes that share the cores: one thread each, and none that spins while it waits.
QUIET := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE
export BENTOML_DO_NOT_TRACK := 1

.PHONY: help serve test check unit coverage model-tests long-tests test-page test-metrics test-ray gpu-tests \
	attack lint types fix lock hooks \
	bench bundle docs pictures screenshots clean

help:
	@echo "make serve        set up, then serve MODEL_ID (nano unless set) on PORT ($(PORT))"
	@echo "make test         set up, then run the tests that need no GPU, with coverage"
	@echo "make check        lint and test: what CI runs"
	@echo "make unit         only the tests that run without torch; T='-k seed' goes to pytest"
	@echo "make model-tests  only the tests on the built-in model and of the bento"
	@echo "make long-tests   what takes minutes: every command of the pages, starts that must fail"
	@echo "make test-page    the page in a real Chromium (apt-get install chromium)"
	@echo "make test-metrics the dashboard and the alert rules in a real Prometheus (apt-get install prometheus)"
	@echo "make test-ray     klein on a real Ray on this machine's CPUs; installs Ray into the environment"
	@echo "make gpu-tests    the tests that need an NVIDIA GPU"
	@echo "make attack       hostile requests, fifty callers for five minutes, faults (20 minutes)"
	@echo "make lint         ruff, mypy and the import layers"
	@echo "make fix          let ruff repair and format what it can"
	@echo "make lock         write requirements*.lock; UPGRADE=--upgrade renews"
	@echo "make hooks        run the linters before every commit"
	@echo "make bench        seconds a picture by stock diffusers and each tier, and the service's share"
	@echo "make bundle       build the image with Docker and run both of its lives (minutes)"
	@echo "make docs         write the tables and plots of the pages again"
	@echo "make pictures     draw the pictures of the README again"
	@echo "make screenshots  the page's pictures of the docs, in a real Chromium"
	@echo "make clean        remove the environment"

serve: $(VENV)/.serve
	MODEL_ID=$${MODEL_ID:-nano} $(BIN)/bentoml serve service:Klein --port $(PORT)

test: coverage model-tests

check: lint test

unit: $(VENV)/.test
	$(QUIET) $(BIN)/python -m pytest -n 3 --dist loadfile $(LIGHT) $(T)

# The floor is in pyproject.toml; klein/inference is measured by no light test and left out.
coverage: $(VENV)/.test
	$(QUIET) $(BIN)/python -m coverage run -m pytest -n 3 --dist loadfile $(LIGHT) $(T)
	$(BIN)/python -m coverage combine --quiet
	$(BIN)/python -m coverage report

model-tests: $(VENV)/.test
	$(QUIET) $(BIN)/python -m pytest -n 3 --dist worksteal tests/model tests/bundle $(T)

long-tests: $(VENV)/.test
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist worksteal -m long tests/doors tests/model $(T)

# needs a Chromium: apt-get install chromium
test-page: $(VENV)/.test
	$(QUIET) $(BIN)/python -m pytest -n 2 --dist loadfile tests/page $(T)

# needs prometheus and promtool: apt-get install prometheus
test-metrics: $(VENV)/.test
	$(QUIET) $(BIN)/python -m pytest tests/monitoring $(T)

# Ray's own imports warn; what klein's do is heard in the other tests.
test-ray: $(VENV)/.ray
	$(QUIET) $(BIN)/python -m pytest tests/ray -s -W default $(T)

gpu-tests: $(VENV)/.test
	$(BIN)/python -m pytest tests/gpu $(T)

# what docs/reliability.md promises, in its long form; root can try the faults of a disk too
attack: $(VENV)/.test
	EXAMPLES=300 $(BIN)/python -m pytest --timeout 0 -s tests/attacks/test_openapi.py
	$(QUIET) $(BIN)/python -m tests.attacks.load
	$(QUIET) $(BIN)/python -m tests.attacks.faults

lint: types
	$(RUFF) check .
	$(RUFF) format --check .
	$(BIN)/lint-imports

types: $(VENV)/.test
	$(BIN)/mypy

fix: $(VENV)/.test
	$(RUFF) check --fix .
	$(RUFF) format .

hooks: $(VENV)/.test
	$(BIN)/pre-commit install

# torch is in the lock without a hash: PyPI's build and the CPU's are different files.
UV_LOCK := pip compile --quiet --universal --python-version 3.11 --generate-hashes \
	--custom-compile-command "make lock"
lock: $(VENV)/.test
	$(BIN)/uv $(UV_LOCK) $(UPGRADE) requirements.txt --no-emit-package torch -o requirements.lock
	grep '^torch==' requirements.txt >>requirements.lock
	$(BIN)/uv $(UV_LOCK) $(UPGRADE) requirements-dev.txt -c requirements.lock -o requirements-dev.lock
	sed -n '/^uv==/,/[^\\]$$/p' requirements-dev.lock >docker/uv.lock
	$(BIN)/uv $(UV_LOCK) $(UPGRADE) requirements-ray.txt -c requirements.lock -o requirements-ray.lock

# BUNDLE="--image klein:local" tries an image that is there already; see tests/bundle/image.py
bundle: $(VENV)/.test
	$(BIN)/python -m tests.bundle.image $(BUNDLE)

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# pip checks hashes for all of a file or for none: so first everything but torch, from the lock,
# then torch with what it brings on this machine, at the pins that the lock was made from.
$(VENV)/.serve: requirements.lock requirements.txt | $(VENV)/bin/python
	grep -v '^torch==' requirements.lock >$(VENV)/hashed.txt
	$(PIP) --no-deps --require-hashes -r $(VENV)/hashed.txt
	$(PIP) -r requirements.txt
	@touch $@

$(VENV)/.test: requirements-dev.lock $(VENV)/.serve
	$(PIP) --no-deps --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.ray: requirements-ray.lock $(VENV)/.test
	$(PIP) --no-deps --require-hashes -r requirements-ray.lock
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
	$(QUIET) $(BIN)/python -m tests.page.screenshots

clean:
	rm -rf $(VENV)
