# make train needs only python3 (with venv and pip), make and git.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train tune tensorboard test test-browser check format clean

train: .venv/installed  ## train on the embedded MNIST with the default recipe
	$(BIN)/python jobs/train.py $(ARGS)

tune: .venv/installed  ## search batch size and learning rate, train the best
	$(BIN)/python jobs/tune.py $(ARGS)

tensorboard: .venv/installed  ## follow runs at http://localhost:6006
	$(BIN)/tensorboard --logdir ~/ray_results $(ARGS)

test: .venv/installed-dev  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

test-browser: .venv/installed-dev  ## look at a report in Chromium, which is to be installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(BIN)/python -m pytest -m browser $(ARGS)

check: .venv/installed-dev  ## run the linter, the formatter's check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed-dev  ## let the linter and the formatter mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made anew when it is missing, was left half-made, or pyproject.toml has changed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[tensorboard]'
	touch $@

# What checks and tests need besides.
.venv/installed-dev: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:  ## remove the virtual environment and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
