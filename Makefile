# Each target does its own set-up (scripts/set-up), so a fresh clone needs nothing but Python 3.11 or later.
VENV := .venv
OUT := out/demo

.PHONY: help demo test check bench clean

help:
	@echo "make demo    the whole paper on the tiny world: runs recipes/tiny.toml into $(OUT)"
	@echo "make test    style, types and every test"
	@echo "make check   style and types only"
	@echo "make bench   the figures of docs/performance.md: measures this and TRL, 37 minutes on two idle cores"
	@echo "make clean   remove $(VENV) and caches; out/ stays"

demo:
	@scripts/set-up run
	@$(VENV)/bin/tastemaker run recipes/tiny.toml --out $(OUT)
	@echo "Open $(OUT)/report.html"

test:
	@scripts/set-up test
	@PYTHON=$(VENV)/bin/python scripts/check
	@$(VENV)/bin/python -m tests.browsers
	@PYTHON=$(VENV)/bin/python scripts/test

check:
	@scripts/set-up test
	@PYTHON=$(VENV)/bin/python scripts/check

bench:
	@scripts/set-up test
	@$(VENV)/bin/python -m benchmarks.bench

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage build dist
	find src tests scripts -name __pycache__ -type d -prune -exec rm -rf {} +
