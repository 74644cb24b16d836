# One command for each thing one does with this project. `make` alone lists them.

bin := .venv/bin
ready := .venv/.ready

.PHONY: help setup check quick types format test pytest nightly gpu demo bench bench-planner docs lock clean

help: ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-13s %s\n", $$1, $$2}' Makefile

setup: $(ready) ## make .venv from requirements.lock (PYTHON=..., PIP_FLAGS=... for an index of your own)

$(ready): requirements.lock pyproject.toml tools/setup.sh
	PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" tools/setup.sh
	@touch $@

check: quick types ## format, lint, types, walls, map, numbers

quick: setup
	$(bin)/ruff format --check
	$(bin)/ruff check
	$(bin)/lint-imports
	$(bin)/python tools/map.py --check
	$(bin)/python tools/readme.py --check

types: setup
	$(bin)/basedpyright

format: setup ## put the code into its form, and fix what can be fixed
	$(bin)/ruff format
	$(bin)/ruff check --fix

test: quick ## check, and every test (TESTS='tests/test_pool.py -x' for a part); types beside the tests
	@$(MAKE) --no-print-directory -j 2 types pytest

pytest: setup
	CUDA_VISIBLE_DEVICES= $(bin)/python -m pytest -n 2 --dist worksteal $(TESTS)

nightly: setup ## every test, thinned ones too, types and shapes checked at each call, 500 random models (SHEAF_EXAMPLES)
	CUDA_VISIBLE_DEVICES= SHEAF_NIGHTLY=1 SHEAF_EXAMPLES=$${SHEAF_EXAMPLES:-500} $(bin)/python -m pytest --jaxtyping-packages=sheaf,typechecker.check

gpu: setup ## every kind of plan on this machine's accelerators, beside plain PyTorch on one of them
	$(bin)/python -m pytest -n 0 -rs tests/parallel/test_accelerator.py $(TESTS)

demo: setup ## the whole road on this machine
	$(bin)/python examples/demo.py

bench: setup ## run the benchmarks
	$(bin)/python -m bench

bench-planner: setup ## score the planner on published runs it was not fitted on
	$(bin)/python -m bench.published

docs: setup ## write what is generated: docs/map.md, the house, the README's numbers
	$(bin)/python tools/map.py
	$(bin)/python tools/house.py
	$(bin)/python tools/readme.py

lock: setup ## write requirements.lock from what is installed
	$(bin)/python tools/lock.py

clean: ## remove everything that can be made again, .venv too
	rm -rf .venv build dist src/*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache .grimp_cache
	find src tests tools bench examples -name __pycache__ -type d -prune -exec rm -rf {} +
