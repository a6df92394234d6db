# From a fresh clone, with Python 3.11 or newer and make: `make demo`, `make test`.
# The first call makes .venv and installs the pinned packages into it; later calls find it ready.

PYTHON ?= python3
VENV ?= .venv
UV_VERSION := 0.13.9
BIN := $(VENV)/bin
UV := $(BIN)/uv

# Take the Python that was asked for, never fetch another; trust what the machine trusts.
export UV_PYTHON_DOWNLOADS := never
export UV_SYSTEM_CERTS := 1

# The tests start hundreds of processes. Where this is set, each of them would compile every module anew: seconds, each.
unexport PYTHONDONTWRITEBYTECODE

# The version is part of the stamp's name: `make PYTHON=python3.13 test` after `make test` installs anew.
PYTHON_VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null)
UV_INSTALLED := $(VENV)/.uv-$(UV_VERSION)-$(PYTHON_VERSION)
INSTALLED := $(VENV)/.installed-$(PYTHON_VERSION)
BENCH_VENV := $(VENV)-bench
BENCH_INSTALLED := $(BENCH_VENV)/.installed-$(PYTHON_VERSION)
BENCH_DURABLE_VENV := $(VENV)-bench-durable
BENCH_DURABLE_INSTALLED := $(BENCH_DURABLE_VENV)/.installed-$(PYTHON_VERSION)

# $(call make-venv,FOLDER): a virtual environment of $(PYTHON), emptied first if it belongs to another version.
define make-venv
	@if ! command -v $(firstword $(PYTHON)) >/dev/null 2>&1; then \
		echo "No '$(PYTHON)' on this machine: whereupon needs Python 3.11 or newer." >&2; \
		echo "Name one, for example: make PYTHON=python3.12 $(or $(MAKECMDGOALS),test)" >&2; exit 1; fi
	@if ! $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
		echo "'$(PYTHON)' is Python $(or $(PYTHON_VERSION),of an unknown version): whereupon needs 3.11 or newer." >&2; \
		echo "Name another, for example: make PYTHON=python3.12 $(or $(MAKECMDGOALS),test)" >&2; exit 1; fi
	@found=$$($(1)/bin/python -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true); \
		if [ "$$found" = "$(PYTHON_VERSION)" ]; then clear=; else clear=--clear; fi; \
		$(PYTHON) -m venv $$clear $(1)
endef

.PHONY: help
help: ## what can be made (this list)
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo "  PYTHON=python3.12 names another Python (3.11 or newer; default: python3)."

.PHONY: install
install: $(INSTALLED) ## the virtual environment with everything in it, no more

$(UV_INSTALLED):
	$(call make-venv,$(VENV))
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)
	@touch $@

$(INSTALLED): $(UV_INSTALLED) pyproject.toml dashtam/pyproject.toml constraints.txt Makefile
	@echo "Python $(PYTHON_VERSION): installing into $(VENV)"
	@$(UV) pip install --quiet --compile-bytecode --python $(BIN)/python -c constraints.txt \
		-e '.[sqlite,postgres,psycopg,cli,fastapi,otel,prometheus,dashboard]' -e 'dashtam[demo]' --group dev
	@touch $@

.PHONY: demo
demo: $(INSTALLED) ## Dashtam, its inbox and a bank; ONCE=1 ends by itself, SIMULATE=200 is a day of 200 people, DATABASE_URL=…
	@exec $(BIN)/python -m dashtam.demo $${DATABASE_URL:+--database-url "$$DATABASE_URL"} $${ONCE:+--once} \
		$${SIMULATE:+--simulate "$$SIMULATE"}

# Two cores are enough to gain from; more than four gain nothing while every test shares one PostgreSQL.
.PHONY: test
test: $(INSTALLED) ## the test-suite; ARGS='-k savepoint -n 0' goes to pytest
	@$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal $(ARGS)

SECONDS ?= 120

.PHONY: soak
soak: $(INSTALLED) ## writers and workers for SECONDS (120), and as many sequences of transactions and reads
	@WHEREUPON_SOAK=$(SECONDS) $(BIN)/python -m pytest -n 0 tests/test_soak.py tests/test_log_model.py $(ARGS)

# One after the other; `make -k check` goes on after a failure, `make types` repeats one part.
.PHONY: check style types layers dependencies
check: style types layers dependencies ## style, types, layers, declared dependencies

style: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: $(INSTALLED)
	$(BIN)/mypy
	$(BIN)/pyright --pythonpath $(BIN)/python

layers: $(INSTALLED)
	$(BIN)/lint-imports --no-logo --no-cache # its cache misses a module that is new while its importers are not

dependencies: $(INSTALLED)
	$(BIN)/deptry src
	cd dashtam && $(abspath $(BIN))/deptry src

.PHONY: format
format: $(INSTALLED) ## let ruff rewrite what it can
	@$(BIN)/ruff check --fix --exit-zero
	@$(BIN)/ruff format

.PHONY: catalogue
catalogue: $(INSTALLED) ## Dashtam's events and who hears them, as they are now: written down where a test compares them
	@$(BIN)/python dashtam/tests/catalogued.py

.PHONY: faults
faults: $(INSTALLED) ## the fault table, in about half an hour; ARGS='--short --only kills' (ARGS=--help tells more)
	@$(BIN)/python -m tests.faults $(ARGS)

.PHONY: bench
bench: $(BENCH_INSTALLED) ## publishing in one process, against other packages
	@$(BENCH_VENV)/bin/python bench/inprocess.py $(ARGS)

# The packages compared with stay out of .venv: their own requirements are none of ours.
$(BENCH_INSTALLED): bench/requirements.txt pyproject.toml $(INSTALLED)
	$(call make-venv,$(BENCH_VENV))
	@echo "Python $(PYTHON_VERSION): installing into $(BENCH_VENV)"
	@$(UV) pip install --quiet --python $(BENCH_VENV)/bin/python -e . -r bench/requirements.txt
	@touch $@

.PHONY: bench-durable
bench-durable: $(BENCH_DURABLE_INSTALLED) ## durable delivery, against other packages; needs PostgreSQL on 127.0.0.1
	@$(BENCH_DURABLE_VENV)/bin/python bench/durable.py $(ARGS)

$(BENCH_DURABLE_INSTALLED): bench/requirements-durable.txt pyproject.toml $(INSTALLED)
	$(call make-venv,$(BENCH_DURABLE_VENV))
	@echo "Python $(PYTHON_VERSION): installing into $(BENCH_DURABLE_VENV)"
	@$(UV) pip install --quiet --python $(BENCH_DURABLE_VENV)/bin/python -e '.[sqlite,postgres]' \
		-r bench/requirements-durable.txt
	@touch $@

.PHONY: bench-observers
bench-observers: $(INSTALLED) ## what metrics and traces cost; needs PostgreSQL on 127.0.0.1
	@$(BIN)/python bench/observers.py $(ARGS)

.PHONY: bench-dashboard
bench-dashboard: $(INSTALLED) ## every page of the dashboard, with millions of events; needs PostgreSQL on 127.0.0.1
	@$(BIN)/python bench/dashboard.py $(ARGS)

# --universal: one file for every Python and platform; nothing in it but names, versions and markers.
.PHONY: lock
lock: $(UV_INSTALLED) ## constraints.txt anew, with the latest versions that fit together
	@$(UV) pip compile --quiet --upgrade --universal --no-header --no-annotate --python $(BIN)/python \
		--no-emit-package whereupon --no-emit-package dashtam --no-emit-index-url --no-emit-find-links \
		--all-extras --group dev pyproject.toml dashtam/pyproject.toml --output-file constraints.txt

.PHONY: clean
clean: ## what was installed, built and cached
	@rm -rf $(VENV) $(BENCH_VENV) $(BENCH_DURABLE_VENV) dist build dashtam/dist .demo .mypy_cache .ruff_cache .pytest_cache \
		.hypothesis .import_linter_cache .coverage
	@find src dashtam tests typing_tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
