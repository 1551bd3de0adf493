# `make demo` and `make test` set everything up in .venv and run; nothing else is needed but Python 3.12.
PYTHON ?= python3.12
VENV := .venv/.installed
RUN := .venv/bin/python
PYTEST = $(RUN) -m pytest -q
WORKERS ?= 2
export OMP_NUM_THREADS := 1

# The rooms without processes or files of their own, and one small run.
QUICK := tests/layout tests/config tests/costs tests/text tests/test_import_rules.py \
	tests/training/test_training.py::test_the_newest_checkpoints_are_kept_and_latest_names_the_last

.PHONY: demo quick test test-all test-gpu faults lint docs clean

demo: $(VENV)
	$(RUN) -m examples.easy_vqa

quick: $(VENV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(PYTEST) -x -n $(WORKERS) $(QUICK)

test: lint
	$(PYTEST) -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test-all: lint
	$(PYTEST) --full -n $(WORKERS) --dist loadfile --no-loadscope-reorder

# On a machine with GPUs and Transformer Engine (requirements-gpu.txt); RUN=python3 takes the python that has them.
test-gpu:
	$(RUN) -m pytest -q -rs tests/gpu tests/functional tests/examples/test_long_vita.py

# Faults that a run must survive, a row for each kind; COUNT=1 tries each once.
COUNT ?= 10
faults: $(VENV)
	$(RUN) -m tests.faults --count $(COUNT) $(if $(OUT),--out $(OUT))

lint: $(VENV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

# The manual as a site, in site/.
docs: $(VENV)
	$(RUN) -m pip install --quiet --requirement requirements-docs.txt
	$(RUN) -m mkdocs build --strict

# The pins of requirements.txt, and this folder itself for the command `vita`.
$(VENV): requirements.txt pyproject.toml
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	$(RUN) -m pip install --quiet --no-build-isolation --no-deps --editable .
	touch $@

clean:
	rm -rf .venv runs site
