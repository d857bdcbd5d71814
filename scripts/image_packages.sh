#!/usr/bin/env bash
# Installs packages while an image is built: image_packages.sh torch | EXTRA... | NAME... (see services/*/Dockerfile).
#
# An argument that pyproject.toml knows as an extra is installed with all it needs; `torch` and any other name is one
# package of the lock. Versions are those of requirements/$DEVICE.lock, DEVICE being cpu (default) or gpu. Package
# sources are pip's, as scripts/setup.sh does it: torch's CPU build comes from a configured folder or index that holds
# it, else from PyTorch's own index.
set -euo pipefail
device=${DEVICE:-cpu}
lock=requirements/$device.lock
[[ -f $lock ]] || { echo "DEVICE=$device: there is cpu and gpu" >&2; exit 2; }
pinned() { sed -n "s/^\($1==[^ ;]*\).*/\1/p" "$lock"; }

torch=$(pinned torch)
eval "$(python3 scripts/package_sources.py --wheel "$torch")"
options=(--quiet --python /opt/venv/bin/python --constraints "$lock" --link-mode copy --compile-bytecode)
# In a folder of CPU wheels torch==X would find X+cpu, which counts as newer than the CUDA build.
[[ $device == cpu ]] || unset UV_FIND_LINKS
install() { env -u UV_TORCH_BACKEND UV_HTTP_TIMEOUT="${UV_HTTP_TIMEOUT:-60}" /uv/bin/uv pip install "${options[@]}" "$@"; }

for name in "$@"; do
  [[ $name-$device != generator-gpu ]] || name=gpu
  if [[ $name == torch && $device == cpu ]]; then
    # Alone first, so that PyTorch's index is asked for this one package only.
    backend=()
    [[ $RATCHET_TORCH_SOURCE != pytorch ]] || backend=(--torch-backend=cpu)
    install --no-deps "${backend[@]}" "$torch"
    install "$torch"
  elif grep -q "^$name = \[" pyproject.toml; then
    if [[ $device == cpu ]]; then
      # xgrammar brings triton (1 GB), which on a CPU switches itself off.
      (cat requirements/excludes.txt; echo triton) >/tmp/excludes.txt
      install -r pyproject.toml --extra "$name" --excludes /tmp/excludes.txt
      rm /tmp/excludes.txt
    else
      install -r pyproject.toml --extra "$name"
    fi
  else
    package=$(pinned "$name")
    install "${package:?$name is not in $lock}"
  fi
done

# The code itself is copied, not installed (services/*/Dockerfile); its version is told all the same.
version=$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
about=$(/opt/venv/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/ratchet_rlhf-$version.dist-info
mkdir -p "$about"
printf '%s\n' "Metadata-Version: 2.1" "Name: ratchet-rlhf" "Version: $version" >"$about/METADATA"
