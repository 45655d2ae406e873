# make train needs only python3 (with venv and pip), make and git.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: train tune test check format clean

train: .venv/installed  ## train on the embedded MNIST with the default recipe
	$(BIN)/python jobs/train.py $(ARGS)

tune: .venv/installed  ## search batch size and learning rate, train the best
	$(BIN)/python jobs/tune.py $(ARGS)

test: .venv/installed  ## run the tests
	$(BIN)/python -m pytest $(ARGS)

check: .venv/installed  ## run the linter, the formatter's check and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/installed  ## let the linter and the formatter mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Made anew when it is missing, was left half-made, or pyproject.toml has changed.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	touch $@

clean:  ## remove the virtual environment and caches
	rm -rf .venv .mypy_cache .pytest_cache .ruff_cache build *.egg-info
