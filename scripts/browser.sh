#!/usr/bin/env bash
# Prints the path of a Chromium for the browser tests (its last line). Installs Debian's where there is none and that is
# possible: as root, or with a sudo that asks no password. `make test` and `make test-browser` run it.
#
#   RATCHET_BROWSER=/path/to/chromium scripts/browser.sh     use this one
set -euo pipefail

find_browser() {
  local name
  for name in ${RATCHET_BROWSER:-chromium chromium-browser google-chrome google-chrome-stable}; do
    if command -v "$name"; then return; fi
  done
  return 1
}

if find_browser; then exit 0; fi
if [[ -n ${RATCHET_BROWSER:-} ]]; then
  echo "browser: RATCHET_BROWSER=$RATCHET_BROWSER is no program; name a Chromium, or unset it" >&2
  exit 1
fi

as_root=()
if ((EUID != 0)); then
  as_root=(sudo --non-interactive)
  command -v sudo >/dev/null && sudo --non-interactive true 2>/dev/null || as_root=(false)
fi
if command -v apt-get >/dev/null && [[ ${as_root[0]-} != false ]]; then
  echo "browser: installing chromium with apt-get" >&2
  export DEBIAN_FRONTEND=noninteractive
  options=(-qq -o Acquire::Retries=3 -o DPkg::Lock::Timeout=300)
  { ${as_root[@]+"${as_root[@]}"} apt-get "${options[@]}" update &&
    ${as_root[@]+"${as_root[@]}"} apt-get "${options[@]}" install -y --no-install-recommends chromium; } >&2 ||
    echo "browser: apt-get failed (its reason is above)" >&2
  if find_browser; then exit 0; fi
fi

# Not with cat: where nothing is on PATH, it is not either.
printf '%s\n' >&2 \
  'browser: there is no Chromium or Chrome on PATH, and it cannot be installed from here. One of these provides it:' \
  '         apt-get install chromium        (Debian)' \
  '         apt-get install chromium-browser (Ubuntu)' \
  '         dnf install chromium            (Fedora)' \
  '         RATCHET_BROWSER=/path/to/chromium make test-browser'
exit 1
