# What a change goes through. `make check` is quick; `make ci` is everything, in a fresh environment.
.PHONY: check format lint types test slow docs mutants coverage ci

# tests/test_NAME.py that make and run whole models: left to `make test`.
LONG := backend bit_identity blas budget calibration child cli compare docs execute foreign gguf hub interruptions plan \
	publish question reliability sample text trailing verify workflows

check: lint types
	pytest -n auto $(LONG:%=--ignore=tests/test_%.py)

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

test:
	pytest -n auto

slow:
	pytest -n auto -m slow

# Regenerates what is generated: the reference of the command line.
docs:
	python -m mlxq.cli.reference docs/cli.md

# make mutants FILE=mlxq/recipe/match.py; docs/testing.md.
mutants:
	python -m tests.mutants $(FILE)

coverage:
	pytest -n auto --cov --cov-branch --cov-report=term-missing:skip-covered

ci:
	bash .ci/run
