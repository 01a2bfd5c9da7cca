# Everything from a bare Debian: make demo | make test. Both set up first; make setup alone does only that.
PYTHON ?= python3
ARGS ?=

.PHONY: setup demo test clean

setup: .venv/.done

# Done again when the dependencies change; make -B setup does it again at any time.
.venv/.done: pyproject.toml setup.py constraints.txt scripts/setup.sh $(wildcard caco/*/*.cpp)
	PYTHON="$(PYTHON)" bash scripts/setup.sh
	touch $@

demo: setup
	.venv/bin/python -m caco.train preset=demo $(ARGS)

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What make made; never runs/.
clean:
	rm -rf .venv build caco.egg-info .pytest_cache
