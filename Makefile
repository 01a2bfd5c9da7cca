# Everything from a bare Debian: make demo | make study | make test | make test-long | make lint | make dashboard | make docs. Each sets up first
# what it needs and is not there yet; make setup alone sets up everything. Again when the dependencies change, and with make -B at any time.
PYTHON ?= python3
ARGS ?=

.PHONY: setup demo demo-record demo-check study gpu-check lint test test-long dashboard docs clean

SET_UP = @AGAIN="$(findstring B,$(firstword -$(MAKEFLAGS)))" PYTHON="$(PYTHON)" bash scripts/setup.sh

setup:
	$(SET_UP) all

demo:
	$(SET_UP) demo
	.venv/bin/python -m caco.train preset=demo $(ARGS)
	.venv/bin/python -m analysis.picture preset=demo $(ARGS)

# The demo over every instruction set and five seeds: experiments/records/demo/README.md. An hour or so on two cores.
demo-record:
	$(SET_UP) demo
	.venv/bin/python -m experiments.demo $(ARGS)

# Two runs of the demo on two instruction sets, held to learn.
demo-check:
	$(SET_UP) demo
	.venv/bin/python -m experiments.demo --check $(ARGS)

# CaCo beside None and MoCo v2 on Fashion-MNIST (apt install dataset-fashion-mnist), one seed.
# The whole study has more rows and seeds: experiments/study_bank.yaml.
study:
	$(SET_UP) demo
	.venv/bin/python -m experiments.run study_bank scale=fashion rows=none_cold,mocov2,small_weighted seed=0 tracking=ledger --here --retry $(ARGS)
	.venv/bin/python -m analysis.table study_bank --scale fashion --rows none_cold,mocov2,small_weighted

# On a GPU for the first time: stages with time limits, results in gpu-check/. ARGS="pack FOLDER" before; benchmarks/gpu_check.py --help.
gpu-check:
	$(SET_UP) all
	.venv/bin/python benchmarks/gpu_check.py $(ARGS)

# All runs of runs/ in a browser, also while they go on; ARGS="--port 8080", python -m caco.tracking.dashboard --help.
dashboard:
	$(SET_UP) dashboard
	.venv/bin/python -m caco.tracking.dashboard $(ARGS)

# The style and the types of every Python file. A commit is checked by the same commands (.pre-commit-config.yaml).
lint: setup
	.venv/bin/python -m ruff check
	.venv/bin/python -m ruff format --check
	.venv/bin/python -m mypy

# The documentation site, build/site: docs/*.md, the README, and references made from conf/, docstrings and records.
docs:
	$(SET_UP) docs
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict
	@echo "build/site/index.html; with a search: .venv/bin/python -m http.server -d build/site"

# Everything that a promise to a user rests on; of one part: make test ARGS=tests/slurm.
test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What is seeded, repeated or slow besides: every method on two and four ranks, every kind of kill, SLURM's rarer turns.
test-long: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile -m long $(ARGS)

# What make made; never runs/.
clean:
	rm -rf .venv build caco_ssl.egg-info .pytest_cache .mypy_cache .ruff_cache
