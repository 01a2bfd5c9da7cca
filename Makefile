# Everything from a bare Debian: make demo | make test | make dashboard. All set up first; make setup alone does only that.
PYTHON ?= python3
ARGS ?=

.PHONY: setup demo demo-record demo-check test dashboard clean

setup: .venv/.done

# Done again when the dependencies change; make -B setup does it again at any time.
.venv/.done: pyproject.toml setup.py constraints.txt scripts/setup.sh $(wildcard caco/*/*.cpp caco/*/*.h)
	PYTHON="$(PYTHON)" bash scripts/setup.sh
	touch $@

demo: setup
	.venv/bin/python -m caco.train preset=demo $(ARGS)
	.venv/bin/python -m analysis.picture preset=demo $(ARGS)

# The demo over every instruction set and five seeds: experiments/records/demo.md. Long: hours on two cores.
demo-record: setup
	.venv/bin/python -m experiments.demo $(ARGS)

# Two runs of the demo on two instruction sets, held to learn.
demo-check: setup
	.venv/bin/python -m experiments.demo --check $(ARGS)

# All runs of runs/ in a browser, also while they go on; ARGS="--port 8080", python -m caco.tracking.dashboard --help.
dashboard: setup
	.venv/bin/python -m caco.tracking.dashboard $(ARGS)

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What make made; never runs/.
clean:
	rm -rf .venv build caco.egg-info .pytest_cache
