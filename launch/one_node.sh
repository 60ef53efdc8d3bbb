#!/usr/bin/env bash
# Trains on one machine with any number of GPUs. One process uses all of them.
#
#   CONFIG=imagenet WORKDIR=/data/xception DATA_DIR=/data/tfds bash launch/one_node.sh [--config.FIELD=VALUE ...]
#
# A run that ends with a code that a restart can fix is started again. Ctrl-C and SIGTERM save and end it.
set -euo pipefail

CONFIG="${CONFIG:-imagenet}"
WORKDIR="${WORKDIR:-runs/$CONFIG}"
DATA_DIR="${DATA_DIR:-}" # where `xception-jax prepare` put the dataset; empty for that of the config
MAX_RESTARTS="${MAX_RESTARTS:-20}"

child="" stopped="" interrupted=""
stop() { # a signal to this script ends `wait`, not the run
  stopped=1 interrupted=1
  [[ -z "$child" ]] || kill -TERM "$child" 2>/dev/null || true
}
trap stop TERM INT

for ((restart = 0; ; restart++)); do
  xception-jax train --config="$CONFIG" --workdir="$WORKDIR" ${DATA_DIR:+--config.data.data_dir="$DATA_DIR"} "$@" &
  child=$!
  [[ -z "$stopped" ]] || stop # it came before there was a child
  interrupted=1
  while [[ -n "$interrupted" ]]; do
    interrupted="" code=0
    wait "$child" || code=$?
  done

  # 74: a disk or network failed, 75: stopped and saved, above 128: killed. All others would fail again.
  if [[ -n "$stopped" ]] || ! ((code == 74 || code == 75 || code > 128)) || ((restart >= MAX_RESTARTS)); then
    exit "$code"
  fi
  echo "$0: the run ended with $code; start $((restart + 2)) of at most $((MAX_RESTARTS + 1))" >&2
  sleep "${RESTART_SECONDS:-5}"
done
