#!/usr/bin/env bash
# Makes cluster/requirements.lock again: what pyproject.toml asks for, for Linux x86-64 and Python 3.11, with hashes.
# The versions are those of the virtual environment here, so what the tests ran with is what the image gets; after
# `make clean setup` that is the newest of everything. Needs uv (`pip install uv`).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${1:-.venv/bin/python}
# opencv-python needs a desktop's libraries; opencv-python-headless is the same module. Everything is installed with
# --no-deps, so leaving it out of the list leaves it out of the image.
uv pip compile pyproject.toml cluster/requirements.in --extra s3 --extra gcs --extra postgres --extra tracing --extra tensorboard \
  --constraint <("$python" -m pip freeze --exclude-editable) \
  --python-version 3.11 --python-platform x86_64-manylinux_2_28 --no-emit-package opencv-python \
  --generate-hashes --no-annotate --custom-compile-command "bash cluster/lock.sh" --quiet \
  --output-file cluster/requirements.lock
