# make demo: three institutions fine-tune one model together, on this machine.
# make test: everything that CI checks.
# make coverage: the same, slower, while coverage is measured.
# make test-all: every case of every grid too, where make test has each two values meet once.
# make check: the checks that run no code of ours: ruff (lint), import contracts (contracts), mypy --strict (types).
# make bits: whether every adapter is, bit for bit, what the last commit gave; BASE=REVISION names another one.
# make attacks: what bad peers can do to a run, half an hour; ARGS="--seconds 5 idle" is one attack for a moment, and
# ARGS="fuzz" changed frames to servers and clients; --tls attacks a run over mutual TLS.
# make soak: 500 rounds over TLS with 20 clients that come and go; memory, descriptors and threads on both sides.
# make chaos: whole federations over TLS, with processes killed, links cut, disks full and clocks wrong, half an hour;
# ARGS="--list" shows the cases, and ARGS="--only disk:" runs some.
# make docs: the documentation site, into build/site. make docs-serve: the same while you write, at http://127.0.0.1:8000.
# All install first: they find Python 3.11 or 3.12, create .venv and install what pyproject.toml names.

PYTHON := $(shell for p in python3.11 python3.12 python3 python; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' 2>/dev/null && echo $$p && break; done)

# half as many again as there are cores: many tests wait for processes that they started
WORKERS := $(shell n=$$(getconf _NPROCESSORS_ONLN); echo $$((n + n / 2)))

# what Python and pytest compile is kept, because each of the hundreds of processes that tests start would do it anew
export PYTHONDONTWRITEBYTECODE :=

PYTEST := .venv/bin/python -m pytest --numprocesses $(WORKERS) --dist worksteal

.PHONY: demo test coverage test-all check lint contracts types bits attacks soak chaos docs docs-serve clean

demo: .venv/installed
	.venv/bin/python -m fedlora_simulations.demo $(ARGS)

test: .venv/installed
	$(PYTEST) $(ARGS)

coverage: .venv/installed
	$(PYTEST) --cov --cov-report=term:skip-covered $(ARGS)

test-all: .venv/installed
	FEDLORA_TESTS=all $(PYTEST) $(ARGS)

check: lint contracts types

lint: .venv/installed
	.venv/bin/ruff check .

contracts: .venv/installed
	.venv/bin/lint-imports

types: .venv/installed
	.venv/bin/mypy

bits: .venv/installed
	.venv/bin/python -m tests.bits $(if $(BASE),--base $(BASE)) $(ARGS)

attacks: .venv/installed
	.venv/bin/python -m tests.attacks $(ARGS)

soak: .venv/installed
	.venv/bin/python -m tests.soak $(ARGS)

chaos: .venv/installed
	.venv/bin/python -m tests.chaos $(ARGS)

docs: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs build --strict

docs-serve: .venv/installed
	NO_MKDOCS_2_WARNING=1 .venv/bin/mkdocs serve

.venv/installed: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "FedLoRA needs Python 3.11 or 3.12 and found neither; install one and run make again."; exit 2; }
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	.venv/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[demo,docs,test]'
	@touch $@

clean:
	rm -rf .venv build dist runs *.egg-info
