# Two commands: `make demo` and `make test`. Each sets up what it needs in .venv and runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
RUN ?= runs/demo
VERIFIED := 0.545  # face_sim of the face world above which two pictures are of one person (magicid/world/README.md)
export OMP_WAIT_POLICY := PASSIVE
export TOKENIZERS_PARALLELISM := false
export RAY_USAGE_STATS_ENABLED := 0
export HF_HUB_OFFLINE := 1

.PHONY: setup demo serve test soak lint bench lab lab-full world clean help

help:  ## what there is
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

setup: $(READY)  ## the virtual environment

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 13))' || \
	  { echo "magicid needs Python 3.11 or 3.12; run e.g.: make PYTHON=python3.11 $(MAKECMDGOALS)"; exit 1; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || { rm -rf $(VENV); $(PYTHON) -m venv $(VENV); } || \
	  { rm -rf $(VENV); echo "this Python has no venv; on Debian and Ubuntu: apt install python3-venv"; exit 1; }
	@echo "Installing packages into $(VENV) (once; a few minutes) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
	@# insightface asks for the OpenCV that needs a desktop's libraries (libGL); the headless one is the same module
	@$(BIN)/python -m pip uninstall --quiet --yes opencv-python
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --force-reinstall opencv-python-headless
	@touch $@

demo: $(READY)  ## two people become two video adapters (six minutes on two cores)
	@$(BIN)/python -m ray_jobs.customize --recipe face-world --identities examples/demo.jsonl --out $(RUN)

serve: $(READY)  ## the demo's adapters behind http://127.0.0.1:8000
	@$(BIN)/python -m serve.local adapters=$(RUN)

test: $(READY)  ## all tests; PYTEST="-k name" for some
	@$(BIN)/python -m pytest $(PYTEST)

soak: $(READY)  ## trials that take hours: chaos, load
	@$(BIN)/python -m pytest -m soak --timeout 3600

lint: $(READY)  ## formatter, linter and type checker
	@$(BIN)/ruff format --check . && $(BIN)/ruff check . && $(BIN)/mypy

bench: $(READY)  ## ratios, measured here
	@for file in benchmarks/bench_*.py; do echo "== $$file"; $(BIN)/python $$file || exit 1; done

lab: $(READY)  ## the small study: tables and figures of two people (under 20 minutes on two cores)
	@$(BIN)/python -m magicid.laboratory runs/lab --plan small
	@$(BIN)/magicid results runs/lab/small --threshold $(VERIFIED) --out runs/lab/small/results

lab-full: $(READY)  ## the whole study: settings on four people, results on eight others (hours; a GPU: minutes)
	@for plan in dev dev-moving dev-captions full; do $(BIN)/python -m magicid.laboratory runs/lab --plan $$plan || exit 1; done
	@$(BIN)/magicid results runs/lab/dev --threshold $(VERIFIED) --out runs/lab/dev/results
	@$(BIN)/magicid results runs/lab/dev-moving --threshold $(VERIFIED) --out runs/lab/dev-moving/results
	@$(BIN)/magicid results runs/lab/dev-captions --threshold $(VERIFIED) --out runs/lab/dev-captions/results
	@$(BIN)/magicid results runs/lab/full --threshold $(VERIFIED) --out runs/lab/full/results

world: $(READY)  ## train the face world's models again, from nothing (hours on a CPU)
	@$(BIN)/python -m magicid.world.build

clean:  ## remove the environment and the runs
	rm -rf $(VENV) runs
