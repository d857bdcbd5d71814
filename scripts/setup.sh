#!/usr/bin/env bash
# Makes .venv with everything the project, its tests and its demo need. `make setup` runs it; running it again is quick.
#
#   scripts/setup.sh                                  the complete CPU set, from requirements/cpu.lock
#   RATCHET_EXTRAS=gpu scripts/setup.sh               the same for NVIDIA GPUs, from requirements/gpu.lock
#   RATCHET_EXTRAS=reward,orchestrator scripts/...    only these extras of pyproject.toml, at the locked versions
#   RATCHET_PYTHON=/path/to/python3.11                the interpreter to use; without it one is looked for
#
# Package sources: whatever pip or uv is configured to use (scripts/package_sources.py); UV_* variables win.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
root=$PWD
venv=$root/.venv
stamp=$venv/.ratchet-setup
kept=$venv/.ratchet-lock  # which lock the environment follows
extras=${RATCHET_EXTRAS:-all}
# An environment made for GPUs stays one: `make demo` after `RATCHET_EXTRAS=gpu make setup` needs no variable.
[[ -n ${RATCHET_EXTRAS:-} || ! -f $kept || $(<"$kept") != requirements/gpu.lock ]] || extras=gpu
lock=requirements/cpu.lock
case ",$extras," in *,gpu,*) lock=requirements/gpu.lock ;; esac

OLDEST_UV=0.8.0          # the oldest that is known to take every option used here
PROBE_TIMEOUT_S=20       # for one answer of a package index; a stalled one must not look like a slow download
started=$SECONDS
step() { printf '==> [%3ds] %s\n' "$((SECONDS - started))" "$*"; }
detail() { printf '      %s\n' "$*"; }
fail() {
  printf '\nsetup: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '       %s\n' "$@" >&2
  exit 1
}

pinned() { sed -n "s/^$1==\([^ ;]*\).*/\1/p" "$lock"; }

# What the environment was made from. A change of any of it is a reason to install again.
fingerprint() {
  { echo "$root" "$extras" "$("$1" -c 'import sys; print(sys.version)')"
    cat "$lock" requirements/excludes.txt pyproject.toml scripts/setup.sh; } | sha256sum
}

if [[ -f $stamp && -x $venv/bin/python && $(<"$stamp") == "$(fingerprint "$venv/bin/python" 2>/dev/null)" ]]; then
  echo "==> .venv is up to date"
  exit 0
fi

# Two set-ups in one tree (two terminals, a CI job and a person) take turns.
if command -v flock >/dev/null; then
  exec 9>"$root/.setup.lock"
  flock --nonblock 9 || { step "another set-up is running here; waiting for it"; flock --timeout 1800 9 ||
    fail "the other set-up has not ended in 30 minutes." "End it, then run this again."; }
  if [[ -f $stamp && $(<"$stamp") == "$(fingerprint "$venv/bin/python" 2>/dev/null)" ]]; then
    step "done by the other set-up"
    exit 0
  fi
fi

# --- Python ----------------------------------------------------------------------------------------------------------
is_311() { [[ -n $1 ]] && "$1" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' >/dev/null 2>&1; }

find_python() {
  local candidate
  if [[ -n ${RATCHET_PYTHON:-} ]]; then
    is_311 "$RATCHET_PYTHON" || fail "RATCHET_PYTHON=$RATCHET_PYTHON is not a working Python 3.11."
    echo "$RATCHET_PYTHON"
    return
  fi
  for candidate in python3.11 python3 python "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.11.*/bin/python \
    /usr/bin/python3.11 /usr/local/bin/python3.11 /opt/homebrew/bin/python3.11; do
    if is_311 "$candidate"; then echo "$candidate"; return; fi
  done
  if command -v uv >/dev/null && candidate=$(uv python find --no-project 3.11 2>/dev/null) && is_311 "$candidate"; then
    echo "$candidate"
    return
  fi
  fail "Python 3.11 was not found (the pinned wheels exist for this version only). Any of these provides it:" \
    "apt-get install python3.11 python3.11-venv     (Debian, Ubuntu)" \
    "dnf install python3.11                         (Fedora, RHEL)" \
    "uv python install 3.11                         (uv)" \
    "pyenv install 3.11                             (pyenv)" \
    "Or name one that lies elsewhere: RATCHET_PYTHON=/path/to/python3.11 make setup"
}

step "looking for Python 3.11"
[[ -f $lock ]] || fail "$lock is missing." "It is part of the repository: git checkout $lock"
python=$(find_python)
detail "$("$python" -c 'import sys; print(sys.executable, sys.version.split()[0])')"
machine=$(uname -s)-$(uname -m)
[[ $machine == Linux-x86_64 ]] || fail "the locked set is made of wheels for Linux on x86_64; this is $machine." \
  "Use the containers instead: docker compose up"

step "making .venv"
has_uv() {  # a uv on PATH that is recent enough
  command -v uv >/dev/null && "$python" - "$(uv --version | cut -d' ' -f2)" "$OLDEST_UV" <<'PY'
import sys
have, need = (tuple(int(part) for part in version.split(".")[:3]) for version in sys.argv[1:])
sys.exit(have < need)
PY
}
follows=$lock
[[ ! -f $kept ]] || follows=$(<"$kept")
if [[ -e $venv/bin/python && $follows == "$lock" ]] && is_311 "$venv/bin/python" &&
  [[ $("$venv/bin/python" -c 'import sys; print(sys.prefix)') == "$venv" ]] &&
  { [[ ! -x $venv/bin/pip ]] || head -n 1 "$venv/bin/pip" | grep -qF "$venv/bin/"; }; then
  detail "keeping the one that is there"
else
  [[ ! -e $venv ]] || detail "replacing one that was made by another Python, in another folder or for another lock"
  if has_uv; then
    "$python" -m venv --clear --without-pip "$venv"
  elif ! "$python" -c 'import ensurepip' 2>/dev/null && ! "$python" -m pip --version >/dev/null 2>&1; then
    fail "this Python has neither pip nor ensurepip, and there is no uv (>= $OLDEST_UV) on PATH. Any of these helps:" \
      "apt-get install python3.11-venv                (Debian, Ubuntu)" \
      "install uv, so that it is on PATH"
  elif "$python" -c 'import ensurepip' 2>/dev/null; then
    "$python" -m venv --clear "$venv"
  else
    "$python" -m venv --clear --without-pip "$venv"
  fi
fi
rm -f "$stamp"
echo "$lock" >"$kept"

# --- Package sources, uv ---------------------------------------------------------------------------------------------
torch=torch==$(pinned torch)
step "looking where packages come from ($torch)"
sources=$("$venv/bin/python" scripts/package_sources.py --wheel "$torch") || fail "scripts/package_sources.py failed." \
  "Run it by hand to see why: $venv/bin/python scripts/package_sources.py --wheel $torch"

step "looking for uv"
if [[ -x $venv/bin/uv ]]; then
  uv=$venv/bin/uv
elif has_uv; then
  uv=$(command -v uv)
else
  # pip reads its own configuration, so this comes before ours is translated. The version is the locked one.
  installer=("$venv/bin/python" -m pip)
  [[ -x $venv/bin/pip ]] || installer=("$python" -m pip --python "$venv/bin/python")
  "${installer[@]}" install -qq --disable-pip-version-check "uv==$(pinned uv)" ||
    fail "uv $(pinned uv) could not be installed with pip." \
      "Check that pip reaches a package index ($python -m pip download uv), or put uv on PATH."
  uv=$venv/bin/uv
fi
detail "$("$uv" --version)"
eval "$sources"
[[ -z ${UV_FIND_LINKS:-} ]] || detail "folders of wheels: $UV_FIND_LINKS"
export VIRTUAL_ENV=$venv UV_HTTP_TIMEOUT=${UV_HTTP_TIMEOUT:-60} UV_PYTHON_DOWNLOADS=never
unset UV_PYTHON UV_SYSTEM_PYTHON CONDA_PREFIX  # these would send the packages elsewhere than into .venv
quiet=()
[[ -t 2 ]] || quiet=(--quiet)  # in a terminal uv draws progress bars; in a log it would list each package
# The index for torch is decided below, for torch alone; the variable would send other packages to it too.
install() { env -u UV_TORCH_BACKEND "$uv" pip install --python "$venv/bin/python" "${quiet[@]}" "$@"; }

# --- Install ---------------------------------------------------------------------------------------------------------
install_cpu_torch() {
  if [[ $RATCHET_TORCH_SOURCE != pytorch ]]; then
    detail "from a configured $RATCHET_TORCH_SOURCE"
    install --no-deps "$torch" ||
      fail "$torch could not be installed from the configured folders or indexes (UV_FIND_LINKS, PIP_FIND_LINKS)."
    return
  fi
  # Alone and without dependencies, so that only this one package is asked for at PyTorch's index, and a machine that
  # cannot reach it hears so within seconds. The local version (+cpu) cannot match a CUDA build.
  detail "from PyTorch's index of CPU builds (no configured folder or index holds it)"
  UV_HTTP_TIMEOUT=$PROBE_TIMEOUT_S UV_HTTP_RETRIES=${UV_HTTP_RETRIES:-1} \
    install --no-deps --torch-backend=cpu "$torch" ||
    fail "the CPU build $torch could not be fetched. Either" \
      "make PyTorch's package index reachable from here (proxy: HTTPS_PROXY, certificates: SSL_CERT_FILE), or" \
      "put the wheel torch-$(pinned torch)-cp311-cp311-manylinux_2_28_x86_64.whl into a folder and name that folder:" \
      "PIP_FIND_LINKS=/that/folder make setup"
}

install_failed() {
  fail "the packages could not be installed (uv's reason is above)." \
    "What is here already stays: run make setup again once the cause is mended." \
    "No package index reachable? Name yours with UV_DEFAULT_INDEX or pip's index-url; both are read."
}

if [[ $lock == requirements/gpu.lock ]]; then
  # Every package, CUDA libraries included, is pinned. A folder of CPU wheels must not be asked: torch==X also
  # matches X+cpu there, which counts as the newer one.
  step "installing $lock (several gigabytes)"
  [[ $extras == gpu ]] || detail "the GPU set is complete; the other extras named are part of it"
  (unset UV_FIND_LINKS; install --no-deps -r "$lock") || install_failed
elif [[ $extras == all ]]; then
  step "installing $torch"
  install_cpu_torch
  step "installing $(grep -c '^[a-z]' "$lock") packages from $lock"
  # The lock is complete, so nothing is resolved: --no-deps also keeps out what requirements/excludes.txt leaves out.
  install --no-deps -r "$lock" || install_failed
else
  chosen=()
  for extra in ${extras//,/ }; do
    grep -qE "^$extra = \[" pyproject.toml || fail "RATCHET_EXTRAS names the extra '$extra', which pyproject.toml lacks."
    chosen+=(--extra "$extra")
  done
  case ",$extras," in *,generator,* | *,reward,* | *,trainer,*)
    step "installing $torch"
    install_cpu_torch ;;
  esac
  step "installing the extras $extras at the versions of $lock"
  install -r pyproject.toml "${chosen[@]}" --constraints "$lock" --excludes requirements/excludes.txt || install_failed
fi

step "installing the project itself, editable"
hatchling=hatchling==$(pinned hatchling)
install --no-deps --editable . --build-constraints <(echo "$hatchling") || install_failed

# --- Checks: what would fail later is told now -----------------------------------------------------------------------
step "checking the environment"
"$venv/bin/python" scripts/check_environment.py || fail "the environment is not usable (see above)." \
  "Mend the cause, then run make setup again."
fingerprint "$venv/bin/python" >"$stamp"
step "done: .venv is ready"
