# make demo      compile a small vision transformer and measure it: accuracy, size, speed
# make test      run the tests
# make lint      ruff and strict mypy
# make wheel     build dist/*.whl and dist/*.tar.gz
# make clean     remove what the targets above made
#
# Each sets up its own environment in $(VENV) first, from $(PYTHON), and only when setup.py, constraints.txt or kernels/ changed.

PYTHON ?= python3
VENV ?= .venv
DEMO_FOLDER ?= mptqc-demo
PYTEST_OPTIONS ?= --numprocesses 2 --dist loadfile
TEST_THREADS ?= 1

bin := $(VENV)/bin
install := $(bin)/python -m pip install --disable-pip-version-check --constraint constraints.txt
set_up := $(VENV)/.created
can_run := $(VENV)/.can-run
can_develop := $(VENV)/.can-develop
kernels := $(wildcard kernels/*/* kernels/*/*/*)

.PHONY: demo test lint format wheel clean
.DELETE_ON_ERROR:

demo: $(can_run)
	$(bin)/python tools/demo.py --output $(DEMO_FOLDER)

test: $(can_develop)
	OMP_NUM_THREADS=$(TEST_THREADS) $(bin)/python -m pytest $(PYTEST_OPTIONS)

lint: $(can_develop)
	$(bin)/ruff check
	$(bin)/ruff format --check
	$(bin)/mypy

format: $(can_develop)
	$(bin)/ruff format
	$(bin)/ruff check --fix

wheel: $(can_develop)
	rm -rf build dist
	$(bin)/python setup.py --quiet sdist
	$(bin)/python -m pip wheel --no-deps --no-build-isolation --wheel-dir dist dist/*.tar.gz

clean:
	rm -rf build dist *.egg-info mptqc/runtime/*.so $(DEMO_FOLDER) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	rm -f $(can_run) $(can_develop) $(set_up)
	rm -rf $(VENV)

$(set_up): constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "mptqc needs Python 3.11 or newer, this is " + sys.version.split()[0] + ": make PYTHON=python3.11 …")'
	$(PYTHON) -m venv $(VENV)
	$(install) --quiet setuptools
	touch $@

$(can_run): $(set_up) setup.py $(kernels)
	$(install) --no-build-isolation --editable .
	touch $@

$(can_develop): $(set_up) setup.py $(kernels)
	$(install) --no-build-isolation --editable '.[export,dev]'
	touch $@
