#!/usr/bin/env bash
# Runs several processes on this machine, on its CPU, to try a run of several hosts before paying for them.
#
#   PROCESSES=2 CONFIG=fashion_mnist WORKDIR=runs/two bash launch/local_processes.sh [--config.FIELD=VALUE ...]
#
# Ctrl-C and SIGTERM save and end the run. The exit code is that of the first process that did not end with 0.
set -euo pipefail

PROCESSES="${PROCESSES:-2}"
CONFIG="${CONFIG:-fashion_mnist}"
WORKDIR="${WORKDIR:-runs/local_processes}"

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("localhost", 0)); print(s.getsockname()[1])'; }

export JAX_PLATFORMS="${JAX_PLATFORMS:-cpu}" # with GPUs, every process would take all of them
export JAX_NUM_PROCESSES="$PROCESSES"
JAX_COORDINATOR_ADDRESS="localhost:$(free_port)"
export JAX_COORDINATOR_ADDRESS

children=() stopped="" interrupted=""
stop() { # a signal to this script ends `wait`, not the processes
  stopped=1 interrupted=1
  ((${#children[@]} == 0)) || kill -TERM "${children[@]}" 2>/dev/null || true
}
trap stop TERM INT

for ((number = 0; number < PROCESSES; number++)); do
  JAX_PROCESS_ID="$number" xception-jax train --config="$CONFIG" --workdir="$WORKDIR" "$@" &
  children+=($!)
done
[[ -z "$stopped" ]] || stop # it came before there were all of them

result=0
for child in "${children[@]}"; do
  interrupted=1
  while [[ -n "$interrupted" ]]; do
    interrupted="" code=0
    wait "$child" || code=$?
  done
  if ((result == 0)); then result=$code; fi
done
exit "$result"
