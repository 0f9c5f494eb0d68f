PYTHON ?= $(shell command -v python3.11 || command -v python3)
INSTALLED := .venv/.installed

.PHONY: setup demo test lint bench clean

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv && .venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[plan,dev]' && touch $@

demo: setup
	.venv/bin/perennial demo

test: setup
	.venv/bin/python -m pytest -m "not slow"

lint: setup
	.venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy --strict data planning && .venv/bin/mypy && .venv/bin/lint-imports && .venv/bin/python -m serving.api.generate --check

bench: setup
	.venv/bin/python -m benchmarks.control_plane && .venv/bin/python -m benchmarks.chaos --seeds 10 --out .perennial/chaos

clean:
	rm -rf .venv .perennial .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache build *.egg-info
