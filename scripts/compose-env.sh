#!/usr/bin/env bash
# Writes .env for docker compose: `make env`. What is there already stays as it is; only what is missing is added.
# Another file: RATCHET_ENV_FILE=prod.env make env, then docker compose --env-file prod.env ...
#
#   scripts/compose-env.sh          secrets, made here
#   scripts/compose-env.sh gpu      the NVIDIA GPUs too, once a container has been seen to reach them (make env GPU=1)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
file=${RATCHET_ENV_FILE:-.env}
umask 077 # the file is for its owner only
with_gpus=
case ${1:-} in gpu) with_gpus=1 ;; "") ;; *) sed -n '2,7p' "$0" >&2; exit 2 ;; esac

fail() {
  printf 'make env: %s\n' "$1" >&2
  shift
  (($# == 0)) || printf '          %s\n' "$@" >&2
  exit 1
}
secret() { head -c 32 /dev/urandom | base64 | tr '+/' '-_' | tr -d '=\n'; } # 43 characters that a URL can hold
has() { [[ -f $file ]] && grep -qE "^$1=." "$file"; }

# GPUs first: when they are asked for and not there, nothing is written.
additions=()
if [[ -n $with_gpus ]] && has RATCHET_GPUS; then
  echo "$file has $(grep '^RATCHET_GPUS=' "$file") already; remove that line to look again"
elif [[ -n $with_gpus ]]; then
  command -v docker >/dev/null || fail "docker is not installed, so no container can be given a GPU."
  docker info >/dev/null 2>&1 || fail "the Docker engine does not answer." "docker info says why."
  # The proof is a container that sees them: that needs the driver, the toolkit and the engine's configuration.
  image=$(sed -n 's/^FROM \([^ ]*\).*/\1/p' services/generator/Dockerfile | head -n 1)
  if ! listed=$(docker run --rm --gpus all --env NVIDIA_DRIVER_CAPABILITIES=utility "$image" nvidia-smi -L 2>&1); then
    fail "a container cannot reach a GPU of this machine; docker says:" \
      "$(grep -vE "^$|docker run --help" <<<"$listed" | tail -n 1)" \
      "A GPU under containers needs an NVIDIA GPU with its driver ('nvidia-smi' lists it on the host), and the NVIDIA" \
      "Container Toolkit, made known to the engine ('sudo nvidia-ctk runtime configure', then restart Docker)." \
      "Without a GPU the stack runs as it is: docker compose up -d --wait"
  fi
  count=$(grep -c '^GPU ' <<<"$listed") || fail "nvidia-smi lists no GPU: $listed"
  # One each where there are three; with two vLLM has its own.
  reward=$((count > 1 ? 1 : 0)) trainer=$((count > 2 ? 2 : count - 1))
  additions+=("RATCHET_GPUS=$count" "RATCHET_GENERATOR_GPUS=0" "RATCHET_REWARD_GPUS=$reward" "RATCHET_TRAINER_GPUS=$trainer")
fi
# A file that is not .env names itself, so that containers are given what compose reads with --env-file.
[[ $file == .env ]] || has RATCHET_ENV_FILE || additions+=("RATCHET_ENV_FILE=$file")
has RATCHET_TOKEN || additions+=("RATCHET_TOKEN=$(secret)")
has RATCHET_REDIS_PASSWORD || additions+=("RATCHET_REDIS_PASSWORD=$(secret)")

if ((${#additions[@]} == 0)); then
  echo "$file is complete and was left as it is"
else
  [[ -f $file ]] || printf '%s\n' "# Of docker compose; made by 'make env'. Settings of the services can be added, e.g. RATCHET_LOG_LEVEL=debug" >"$file"
  [[ -z $(tail -c 1 "$file") ]] || echo >>"$file"
  printf '%s\n' "${additions[@]}" >>"$file"
  names=("${additions[@]%%=*}")
  echo "$file: wrote ${names[*]}"
fi
chmod 600 "$file"
files="docker compose"
[[ $file == .env ]] || files+=" --env-file $file"
if has RATCHET_GPUS && [[ -n $with_gpus ]]; then
  files+=" -f docker-compose.yml -f compose.gpu.yml"
  [[ $(sed -n 's/^RATCHET_GPUS=//p' "$file") != 1 ]] || files+=" -f compose.single-gpu.yml"
fi
echo "next: $files up -d --wait"
