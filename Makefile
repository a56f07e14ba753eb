# make demo   a whole swarm on this machine: trains on Jane Austen, loses a peer, gets it back, ends with a verdict
# make test   every gate and every test, cheapest first
# make lint   the gates alone
# make protos the committed stubs anew, after a change of protos/swarm.proto
# Each sets up what it needs in .venv; nothing is installed outside this folder.

PYTHON ?= python3
BIN := .venv/bin

# One thread a process: several processes share the cores, and torch threads that wait for each other crawl.
export OMP_NUM_THREADS := 1

.PHONY: demo test lint protos

demo: .venv/installed
	$(BIN)/swarmoe local --preset demo --seed 0 --peers 4 --trainers 1 --kill-every 35 --report runs/demo.json

test: lint .venv-protobuf7/installed
	.venv-protobuf7/bin/python -m tests.protobuf7
	$(BIN)/python -m pytest -x -m "not docker and not browser and not cuda"

lint: .venv/installed-dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/lint-imports
	$(BIN)/basedpyright --pythonpath $(BIN)/python

protos: .venv/installed-dev
	$(BIN)/python -m grpc_tools.protoc -I . --python_out=. --pyi_out=. --grpc_python_out=. protos/swarm.proto

.venv/installed: pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable .
	touch $@

.venv/installed-dev: pyproject.toml | .venv
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@ .venv/installed

.venv:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "swarmoe needs Python 3.11 or newer: make PYTHON=python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $@

# The stubs run on protobuf 6 and on 7; .venv has whichever goes with the tools, so the other gets a folder of its own.
.venv-protobuf7/installed: pyproject.toml
	$(PYTHON) -m venv .venv-protobuf7
	.venv-protobuf7/bin/python -m pip install --quiet 'protobuf>=7,<8' 'grpcio>=1.81.1,<2'
	touch $@
