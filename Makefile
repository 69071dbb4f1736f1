# make demo    the main job on an embedded default        make check   everything CI runs
# make test    the tests                                  make bench   the two benchmarks, beside the peers
# make peers   SAEs, latent caches and dashboards read and written, beside the libraries they belong to
# make families  every model family in every use, as a page: docs/supported_models.md
# make kernels   the Triton kernels against PyTorch's operations, in Triton's interpreter (Linux; a gigabyte)
# make package   the archives of a release built, checked, installed and tested as installed
# make coverage  the tests, and which lines they run: build/coverage/, docs/coverage.md
# make kills   every command cut off at every one of its file events
# make test-machines   the tests as older processors, more threads and other seeds run them: ROWS="old seeds" for some
# make fuzz    5,000 damaged files of every kind, each read in a process of its own; and 1,000 flipped bits
# make test-oldest, make test-newest   the tests with the lowest versions that pyproject.toml allows, and with today's
# Each makes the environment it needs by itself, once. `make test TL=3.9.0` and `make check TL=3.9.0` use another
# transformer-lens, in an environment of its own; `make test VERSIONS=oldest` or `newest` all other versions;
# PYTHON=python3.12 another interpreter.

PYTHON ?= python3
TL ?=
VERSIONS ?=
CONSTRAINTS := $(if $(VERSIONS),constraints-$(VERSIONS).txt,constraints.txt)
VENV := .venv$(addprefix -tl-,$(TL))$(addprefix -,$(VERSIONS))
BENCH := .venv-bench
BIN := $(VENV)/bin
SIDE_BY_SIDE := -n auto --maxprocesses 4 --dist loadfile
PYTEST := HF_HUB_OFFLINE=1 $(BIN)/pytest -q $(SIDE_BY_SIDE)
SOURCES := $(shell find saelab tests scripts docs conftest.py README.md -name '*.py' -o -name '*.md' 2>/dev/null)
# Triton has wheels for Linux alone.
TRITON := 3.9.0
KERNELS := $(if $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m)),kernels)
NOTEBOOKS = $(wildcard notebooks/*.ipynb)

# $(1) environment, $(2) extra, $(3) transformer-lens version, if not the one in constraints.txt
define install
	$(PYTHON) -m venv $(1)
	sed -e '$(if $(3),s/^transformer-lens==.*/transformer-lens==$(3)/)' $(CONSTRAINTS) > $(1)/constraints.txt
	$(1)/bin/pip install -q -c $(1)/constraints.txt -e '.[$(2)]'
endef

.PHONY: demo install test test-oldest test-newest check kernels package coverage lint types notebooks docs docs-build format bench peers kills test-machines families fuzz

demo: $(VENV)/.installed
	$(BIN)/saelab demo

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml $(CONSTRAINTS)
	$(call install,$(VENV),dev,$(TL))
	@touch $@

test: $(VENV)/.installed
	$(PYTEST)
	@touch $(VENV)/.tested

test-oldest test-newest:
	$(MAKE) test VERSIONS=$(@:test-%=%)

# `make check` runs the tests (units, doctests, floors, README blocks) unless they passed since the last change.
$(VENV)/.tested: $(VENV)/.installed $(SOURCES)
	$(MAKE) test

# Two parts at a time, as some keep one processor busy; each shows its output when it is done, and one that fails fails all.
check: $(VENV)/.tested
	$(MAKE) --jobs=2 $(if $(filter output-sync,$(.FEATURES)),--output-sync=target) lint types notebooks docs-build package $(KERNELS)

# Triton lies beside the environment's packages, as nobody else needs it.
kernels: $(VENV)/.installed
	test -d $(VENV)/triton || $(BIN)/pip install -q --no-deps --target $(VENV)/triton triton==$(TRITON)
	PYTHONPATH=$(VENV)/triton $(BIN)/python -c "import triton"  # without it the tests are skipped
	PYTHONPATH=$(VENV)/triton HF_HUB_OFFLINE=1 $(BIN)/pytest -q tests/functional/test_triton_kernels.py

lint: $(VENV)/.installed
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.installed
	$(BIN)/mypy

# Without the tests' conftest, which loads saelab in processes that only start kernels.
ONE_THREAD := OMP_NUM_THREADS=1 OPENBLAS_NUM_THREADS=1 MKL_NUM_THREADS=1
notebooks: $(VENV)/.installed
	$(if $(NOTEBOOKS),SAELAB_FAST=1 $(ONE_THREAD) $(PYTEST) --noconftest -o addopts= --nbmake --nbmake-timeout=300 $(NOTEBOOKS))

# Notebooks are not run for it: their stored outputs are shown. Nothing is fetched.
docs-build: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

docs: $(VENV)/.installed
	PATH="$(abspath $(BIN)):$$PATH" NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs serve

# The archives of a release, built, checked and installed; one in ONE_IN tests of some files, from the unpacked archive.
ONE_IN ?= 12
package: $(VENV)/.installed
	$(BIN)/python scripts/check_package.py --constraints $(VENV)/constraints.txt --one-in $(ONE_IN) $(if $(filter 1,$(ONE_IN)),$(SIDE_BY_SIDE))

# Which lines the tests run: a table, build/coverage/ and the page docs/coverage.md. Twice as slow as `make test`.
COVERAGE := build/coverage
coverage: $(VENV)/.installed
	$(PYTEST) --cov --cov-report=term:skip-covered --cov-report=xml:$(COVERAGE)/coverage.xml \
	    --cov-report=html:$(COVERAGE)/html --cov-report=json:$(COVERAGE)/coverage.json
	$(BIN)/python scripts/show_coverage.py $(COVERAGE)/coverage.json docs/coverage.md

format: $(VENV)/.installed
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

# The peers hold transformer-lens below 4. dictionary-learning also drags in torchvision, which nothing here uses and
# whose PyPI build fails to load, and transformers with it, beside a torch built for the CPU. The last four hold versions
# of other libraries back that their reading and writing needs nothing of, so they come without what they ask for.
PEERS := circuit-tracer==0.5.0 eai-delphi==0.1.3 overcomplete==0.3.0 sae-dashboard==0.8.0
PEERS_NEED := asyncer dataclasses-json decode-clt eindex-callum 'marshmallow<4' mypy-extensions orjson sniffio typing-inspect
$(BENCH)/.installed: pyproject.toml constraints.txt
	$(call install,$(BENCH),bench,3.9.0)
	$(BENCH)/bin/pip uninstall -q -y torchvision
	$(BENCH)/bin/pip install -q matplotlib
	$(BENCH)/bin/pip install -q --no-deps $(PEERS) $(PEERS_NEED)
	@touch $@

bench: $(BENCH)/.installed
	$(BENCH)/bin/python benchmarks/train_step.py
	$(BENCH)/bin/python benchmarks/collect.py

# Their imports warn.
peers: $(BENCH)/.installed
	HF_HUB_OFFLINE=1 $(BENCH)/bin/python -m pytest -q -W ignore $(wildcard tests/sae/formats/test_*_peers.py tests/interop/test_*_peers.py)

# Every command cut off at every file event, and on a full disk at each of them.
kills: $(VENV)/.installed
	$(PYTEST) --dist load -m slow tests/test_kills.py

# The rows are in the script. Tests run side by side only where a row leaves processors for it.
ROWS ?=
test-machines: $(VENV)/.installed
	$(BIN)/python scripts/test_machines.py $(ROWS) -- -n auto --maxprocesses 4 --dist loadfile

# Tiny random models of all architectures that both libraries list, against Hugging Face's own modules.
families: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python tests/families/run.py

# Files of every kind, damaged: read, or refused by name.
fuzz: $(VENV)/.installed
	HF_HUB_OFFLINE=1 $(BIN)/python -W ignore -m tests.fuzz 5000
	HF_HUB_OFFLINE=1 $(BIN)/pytest -q -m slow tests/stores/test_validation.py
