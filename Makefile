# Everything from a bare Debian: make demo | make test | make dashboard. Each sets up first what it needs and is not there
# yet; make setup alone sets up everything. Again when the dependencies change, and with make -B at any time.
PYTHON ?= python3
ARGS ?=

.PHONY: setup demo test dashboard clean

SET_UP = @AGAIN="$(findstring B,$(firstword -$(MAKEFLAGS)))" PYTHON="$(PYTHON)" bash scripts/setup.sh

setup:
	$(SET_UP) all

demo:
	$(SET_UP) demo
	.venv/bin/python -m caco.train preset=demo $(ARGS)

# All runs of runs/ in a browser, also while they go on; ARGS="--port 8080", python -m caco.tracking.dashboard --help.
dashboard:
	$(SET_UP) dashboard
	.venv/bin/python -m caco.tracking.dashboard $(ARGS)

test: setup
	.venv/bin/python -m pytest -n 2 --dist loadfile $(ARGS)

# What make made; never runs/.
clean:
	rm -rf .venv build caco_ssl.egg-info .pytest_cache
