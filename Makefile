# What a change goes through. `make check` is quick; `make ci` is everything, in a fresh environment.
.PHONY: check format lint types test slow docs mutants coverage ci

check: lint types test

format:
	ruff format .
	ruff check --fix .

lint:
	ruff format --check .
	ruff check .

types:
	mypy

test:
	pytest -n auto -m "not slow and not medium"

slow:
	pytest -n auto -m "slow or medium or not slow"

# Regenerates what is generated: the reference of the command line.
docs:
	python -m mlxq.cli.reference docs/cli.md

# make mutants FILE=mlxq/recipe/match.py
mutants:
	python -m tests.mutants $(FILE)

coverage:
	pytest -n auto --cov --cov-branch --cov-report=term-missing:skip-covered

ci:
	bash .ci/run
