# `make demo` and `make test` set everything up in .venv and run; nothing else is needed but Python 3.12.
PYTHON ?= python3.12
VENV := .venv/.installed
RUN := .venv/bin/python
export OMP_NUM_THREADS := 1

.PHONY: demo test test-all test-gpu lint clean

demo: $(VENV)
	$(RUN) -m examples.easy_vqa

test: lint
	$(RUN) -m pytest -q

test-all: lint
	VITA_TEST_ALL=1 $(RUN) -m pytest -q

# On a machine with GPUs and Transformer Engine (requirements-gpu.txt); RUN=python3 takes the python that has them.
test-gpu:
	$(RUN) -m pytest -q -rs tests/gpu tests/functional tests/examples/test_long_vita.py

lint: $(VENV)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

$(VENV): requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf .venv runs
