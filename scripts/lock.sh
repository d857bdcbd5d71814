#!/usr/bin/env bash
# Renews requirements/*.lock from pyproject.toml: `make lock`. What is locked stays unless it no longer fits;
# `make lock LOCK_ARGS=--upgrade` takes the newest versions, LOCK_ARGS="--upgrade-package NAME" that of one package.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python uv=.venv/bin/uv
torch=$(sed -n 's/^  "\(torch==[0-9.]*\)".*/\1/p' pyproject.toml | head -n 1)
eval "$($python scripts/package_sources.py --wheel "$torch+cpu")"
everything=(--extra reward --extra trainer --extra orchestrator --extra local --extra demo --extra trackers --extra dev)
options=(--quiet --python-version 3.11 --python-platform x86_64-manylinux_2_28 --custom-compile-command "make lock")
backend=()
[[ $RATCHET_TORCH_SOURCE != pytorch ]] || backend=(--torch-backend=cpu)
# The lock must hold for everybody: pip's extra indexes of this machine have no say in it, unless torch lies there.
[[ $RATCHET_TORCH_SOURCE == index ]] || unset UV_INDEX UV_EXTRA_INDEX_URL

echo "==> requirements/cpu.lock"
env -u UV_TORCH_BACKEND $uv pip compile pyproject.toml "${everything[@]}" --extra generator "${options[@]}" \
  "${backend[@]}" --excludes requirements/excludes.txt --output-file requirements/cpu.lock "$@" >/dev/null
echo "==> requirements/gpu.lock"
env -u UV_TORCH_BACKEND -u UV_FIND_LINKS $uv pip compile pyproject.toml "${everything[@]}" --extra gpu "${options[@]}" \
  --output-file requirements/gpu.lock "$@" >/dev/null
