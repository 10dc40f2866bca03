# Each target does all the set-up that it needs, and nothing twice.
PYTHON ?= python3
BIN := .venv/bin
DOCS := docs
BUILD := .venv/pages

.PHONY: help install amazon lock runserver lab test look check lint notebooks docs bench attack fuzz soak slow mutants trace update-l10n

help:  ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: .venv/done  ## make .venv and install all pinned requirements

# What the server needs is the first part of both files, down to the first empty line. pip takes
# only files whose hashes the lock names: PIP_ONLY_BINARY=:all: refuses those to be compiled, too.
LOCKED := $(BIN)/pip install --quiet --disable-pip-version-check --require-hashes

.venv/server: requirements-lock.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv
	awk -v RS= 'NR == 1' requirements-lock.txt | $(LOCKED) -r /dev/stdin
	@touch $@

.venv/done: .venv/server notebooks/lessons.pth
	$(LOCKED) -r requirements-lock.txt
	@# So that a kernel finds lab.py, whatever folder its program starts it in.
	@sed 's|@ROOT@|$(CURDIR)|' notebooks/lessons.pth > $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/lessons.pth
	@touch $@

amazon: .venv/server  ## install also what DynamoDB and Amazon SNS need
	awk -v RS= 'NR <= 2' requirements-lock.txt | $(LOCKED) -r /dev/stdin

lock: .venv/server  ## write requirements-lock.txt anew from requirements.txt (ARGS="--upgrade": newer ones)
	test -d .parts/uv || $(BIN)/pip install --quiet --target .parts/uv uv==0.13.9
	$(BIN)/python tests/lock.py .parts/uv/bin/uv $(ARGS)
	$(LOCKED) -r requirements-lock.txt
	$(BIN)/python tests/lock.py

runserver: .venv/server  ## start the gateway on http://127.0.0.1:5000
	@exec $(BIN)/python gateway.py $(ARGS)

MINE := gateway.py locale notebooks tests Makefile pyproject.toml requirements.txt requirements-lock.txt

lab: .venv/done  ## open the lessons in JupyterLab, in my/: a copy of all, yours to change
	@test -d my || { mkdir my && cp -Rp $(MINE) my/ && ln -s "$(abspath .venv)" "$(abspath .parts)" my/; }
	@test ! gateway.py -nt my/gateway.py || echo "my/ is older than this gateway.py: to begin anew, move your work out of it and delete it"
	cd my && exec "$(abspath $(BIN))/jupyter" lab --LabApp.default_url=/lab/tree/notebooks/00_the_whole_flow.ipynb $(ARGS)

# Up to three tests that failed beside others are run alone.
AGAIN = || { test $$? = 1 && $(BIN)/python tests/again.py; }

# Each worker would compile each file, and each start of a process: more than a minute of a core.
test look check: export PYTHONDONTWRITEBYTECODE =

test: .venv/done  ## run all tests, notebooks included (ARGS=tests/test_codes.py: one file, in one process)
	$(BIN)/python -m pytest $(ARGS)$(if $(ARGS),,$(AGAIN))

LOOK := $(patsubst %,tests/test_%.py,docs pages_in_browser press_in_browser jupyterlab)

look: .venv/done  ## build the pages, look at them in Chromium, press what can be pressed (two minutes)
	$(BIN)/python -m pytest -n 2 $(LOOK)$(AGAIN)

check: lint  ## before each commit, in a minute: lint, and the tests that are not slow
	$(BIN)/python -m pytest -q -o addopts= -p no:nbval -p no:valkey -p no:schemathesis -n auto -m "not slow" tests $(ARGS)

lint: .venv/done  ## check formatting, style and types
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/mypy

notebooks: .venv/done  ## execute the notebooks again, in place
	$(BIN)/jupyter nbconvert --to notebook --execute --inplace --ExecutePreprocessor.record_timing=False $(wildcard notebooks/*.ipynb)
	$(BIN)/jupyter nbconvert --to notebook --inplace --CoalesceStreamsPreprocessor.enabled=True $(wildcard notebooks/*.ipynb)

docs: .venv/done  ## build the pages in docs/, to be opened from disk
	rm -rf $(BUILD)
	$(BIN)/python -m sphinx -q -W --keep-going -d $(BUILD)/doctrees notebooks $(BUILD)/html
	rm -rf $(DOCS) && mv $(BUILD)/html $(DOCS)
	@echo "open $(DOCS)/index.html"

bench: .venv/done  ## measure what each request costs (seven minutes; ARGS="--help" tells more)
	$(BIN)/python tests/bench/bench.py $(ARGS)

attack: .venv/done  ## attack a gateway in four ways, with limits enforced, recorded and off (16 minutes)
	PYTHONPATH=.:notebooks $(BIN)/python tests/attack.py $(ARGS)

fuzz: .venv/done  ## hostile inputs and odd orders of calls, for an hour (ARGS="--minutes 5 --seed 7")
	$(BIN)/python tests/fuzz.py $(ARGS)

soak: .venv/done  ## fifty clients while one thing after another breaks (ten minutes; a full disk needs root)
	PYTHONPATH=.:notebooks $(BIN)/python tests/soak.py $(ARGS)

slow: .venv/done  ## 200 slow clients beside 20 honest flows a second, through nginx (a minute; nginx is needed)
	PYTHONPATH=.:notebooks $(BIN)/python tests/slow.py $(ARGS)

mutants: .venv/done  ## break 300 lines of the protocol, one by one, to see tests notice (ARGS="--count 60")
	PYTHONPATH=tests:notebooks:. $(BIN)/python tests/mutants.py $(ARGS)

trace: .venv/done  ## follow a /sms/verify and a /sms/verify_code: calls, depth, sections (ARGS=-v: each call)
	$(BIN)/python tests/bench/calls.py $(ARGS)

L10N := --no-wrap -N --ignore-obsolete --ignore-pot-creation-date -i locale/messages.pot -d locale

update-l10n: .venv/done  ## extract the message, update and compile all languages (NOVERIFY=yes: do not ask)
	@[ "$(NOVERIFY)" = yes ] || { printf 'This rewrites the files in locale/. Go on? [y/N] '; read answer; [ "$$answer" = y ]; }
	$(BIN)/pybabel -q extract --no-location --omit-header -s -c Translators: -o locale/messages.pot gateway.py
	$(BIN)/pybabel -q update $(L10N)
	$(BIN)/pybabel -q compile -d locale
	@PYTHONPATH=notebooks $(BIN)/python -c 'import lab, sys; sys.exit("\n".join(lab.catalogue_faults()) or 0)'
	$(BIN)/python gateway.py messages
