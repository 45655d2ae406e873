# make train needs only python3 (with venv and pip), make and git.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# A version of Ray for a new environment: make train VENV=.venv-2.51 RAY=2.51.2
PIN := $(if $(RAY),'ray==$(RAY)')
ADDRESS ?= http://localhost:8265
JOB ?= train
# If there is a token, clusters require it.
AUTH ?= $(or $(RAY_AUTH_MODE),$(if $(wildcard $(HOME)/.ray/auth_token)$(RAY_AUTH_TOKEN),token,disabled))

.PHONY: train tune new tensorboard submit test test-docs test-examples test-deploy test-processes test-long test-ray test-browser test-gpu bench bench-quick chaos check format docs docs-serve clean

train: $(VENV)/installed  ## train on the embedded MNIST with the default recipe
	$(BIN)/python jobs/train.py $(ARGS)

tune: $(VENV)/installed  ## search batch size and learning rate, test the best trial
	$(BIN)/python jobs/tune.py $(ARGS)

new: $(VENV)/installed  ## make a project of your own: make new NAME=../pets KIND=images
	$(BIN)/python -m mnist_ray new $(NAME) --kind $(or $(KIND),blank) $(ARGS)

tensorboard: $(VENV)/installed  ## follow runs at http://localhost:6006
	$(BIN)/tensorboard --logdir ~/ray_results $(ARGS)

submit: $(VENV)/installed  ## run a job on a cluster: make submit ADDRESS=http://HEAD:8265 JOB=tune ARGS='--num-trials 16'
	RAY_AUTH_MODE=$(AUTH) $(BIN)/ray job submit --address $(ADDRESS) --working-dir . $(SUBMIT_ARGS) -- python jobs/$(JOB).py $(ARGS)

test: $(VENV)/installed-dev  ## run the tests of the packages, in five minutes
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --durations=25 $(AROUND:%=--ignore=tests/%) $(ARGS)

# What is around the packages.
AROUND := docs examples deploy gpu
test-docs: $(VENV)/installed-dev  ## run the code and the commands of the guides
	$(BIN)/python -m pytest tests/docs $(ARGS)

test-examples: $(VENV)/installed-dev  ## train the examples, also on a pretended GPU
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile tests/examples tests/gpu $(ARGS)

test-deploy: $(VENV)/installed-dev  ## check the files in deploy/
	$(BIN)/python -m pytest tests/deploy $(ARGS)

test-processes: $(VENV)/installed-dev  ## run the tests that start a Ray or a job in processes of their own
	$(BIN)/python -m pytest -m 'processes and not long and not browser' --numprocesses 2 --dist loadfile --durations=25 $(ARGS)

test-long: $(VENV)/installed-dev  ## run the tests that take minutes
	$(BIN)/python -m pytest -m 'long and not browser' $(ARGS)

test-ray: $(VENV)/installed-dev  ## run jobs in both forms, default and plain: make test-ray VENV=.venv-2.51 RAY=2.51.2
	$(BIN)/python -m pytest -m any_ray --durations=25 tests/test_any_ray.py $(ARGS)

test-gpu: $(VENV)/installed-dev  ## run the tests that need a GPU
	$(BIN)/python -m pytest -q -m gpu $(ARGS) tests/gpu || [ $$? = 5 ]  # 5: without a GPU, there is no test

bench: $(VENV)/installed-dev  ## compare the speed with other programs and an earlier version: over an hour
	$(BIN)/python benchmarks/bench.py $(ARGS)

bench-quick: $(VENV)/installed-dev  ## check in four minutes that bench.py works
	$(BIN)/python benchmarks/bench.py --quick $(ARGS)

chaos: $(VENV)/installed-dev  ## kill workers, nodes and drivers of many runs: an hour
	$(BIN)/python benchmarks/chaos.py $(ARGS)

test-browser: $(VENV)/installed-dev  ## test reports in Chromium, which must be installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[browser]'
	$(BIN)/python -m pytest -m browser $(ARGS)

check: $(VENV)/installed-dev  ## check lint, format, also of the code in the docs, spelling and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/codespell
	$(BIN)/mypy

format: $(VENV)/installed-dev  ## fix lint and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/installed-docs  ## build the documentation as a site in build/site
	$(BIN)/mkdocs build --strict

docs-serve: $(VENV)/installed-docs  ## show that site at http://localhost:8000, and every change to a page
	$(BIN)/mkdocs serve $(ARGS)

# Rebuilt if it is missing or incomplete, or if pyproject.toml has changed.
$(VENV)/installed: pyproject.toml
	@echo "installing into $(VENV), which takes a minute or two …"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[cluster,tensorboard]' $(PIN)
	touch $@

# Adds the packages that checks and tests need.
$(VENV)/installed-dev: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]' $(PIN)
	touch $@

# Adds the packages that the site needs.
$(VENV)/installed-docs: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[docs]' $(PIN)
	touch $@

clean:  ## remove the virtual environment and caches
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache build *.egg-info
