#!/usr/bin/env bash
# Trains on a Cloud TPU slice: requests it, installs this repository on its workers, starts the run on all of them, and
# deletes the slice in the end. If a spot slice is taken away, a new one is requested and the run goes on.
#
#   NAME=xception ZONE=us-west4-a TYPE=v5litepod-64 WORKDIR=gs://my-bucket/xception DATA_DIR=/data/tfds \
#     bash launch/tpu_vm.sh [--config.FIELD=VALUE ...]
#
# Run it at the top of the repository, on a machine that stays on, for example in tmux on a small VM. If it is stopped,
# the run goes on; start it again to follow. It only deletes the slice when the run has ended; KEEP=1 keeps it.
set -euo pipefail

NAME="${NAME:-xception}" # of the queued resource and of the slice
ZONE="${ZONE:?such as us-west4-a}"
TYPE="${TYPE:-v5litepod-64}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" # v4: tpu-ubuntu2204-base, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
CAPACITY="${CAPACITY:---spot}"            # or --guaranteed, --reserved
CONFIG="${CONFIG:-imagenet}"
WORKDIR="${WORKDIR:?such as gs://my-bucket/xception; the disks of the workers end with the slice}"
DATA_DIR="${DATA_DIR:-}"   # where every worker finds the dataset
DATA_DISK="${DATA_DISK:-}" # a disk to attach read-only, such as projects/my-project/zones/us-west4-a/disks/tfds
SETUP="${SETUP:-true}"   # what every new worker runs once, such as 'gcsfuse --implicit-dirs my-data-bucket /data'
MAX_RESTARTS="${MAX_RESTARTS:-100}"
POLL_SECONDS="${POLL_SECONDS:-30}"

trap 'exit 130' INT TERM # stops this script, but neither the run nor the slice

state() { # of the queued resource
  local answer
  if answer="$(gcloud compute tpus queued-resources describe "$NAME" --zone="$ZONE" --format='value(state.state)' 2>&1)"; then
    echo "${answer##*$'\n'}" # the last line, after warnings
  elif [[ "$answer" == *NOT_FOUND* ]]; then
    echo NONE
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

create() {
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "$CAPACITY" \
    ${DATA_DISK:+"--data-disk=source=$DATA_DISK,mode=read-only"} || exit
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet || exit
}

on_all_workers() { # returns the first code that is not 0; 255 if a worker cannot be reached
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

wait_for_slice() { # requests one if there is none, and waits, for days if need be
  while true; do
    case "$(state)" in
      ACTIVE) return ;;
      NONE) create ;;
      FAILED | SUSPENDING | SUSPENDED) delete ;; # a spot slice that was taken away
    esac
    sleep "$POLL_SECONDS"
  done
}

install() { # the commit that is checked out here, with a Python that is new enough
  git archive --format=tar.gz --output="$archive" HEAD &&
    { gcloud compute tpus tpu-vm scp "$archive" "$NAME:" --zone="$ZONE" --worker=all || return 255; } &&
    on_all_workers "pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 ~/venv &&
      ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python \"xception_jax[tpu,cloud] @ file://\$HOME/xception_jax.tar.gz\" &&
      $SETUP && touch ~/installed"
}

archive="$(mktemp -d)/xception_jax.tar.gz"
# If the connection is lost, the run goes on: tee -p still reads what it prints. flock makes the next start wait for it.
printf -v train ' %q' train --config="$CONFIG" --workdir="$WORKDIR" --config.data.data_dir="$DATA_DIR" "$@"
train="set -o pipefail; flock ~/run.lock ~/venv/bin/xception-jax$train 2>&1 | tee -p -a ~/run.log"

for ((restart = 0; ; restart++)); do
  wait_for_slice
  code=0
  on_all_workers "test -e ~/installed" || code=$?
  ((code != 1)) || { code=0 && install || code=$?; }
  ((code != 0)) || on_all_workers "$train" || code=$?

  # 74: a disk or network failed, 75: stopped and saved, above 128: killed. All others would fail again.
  if ! ((code == 74 || code == 75 || code > 128)) || ((restart >= MAX_RESTARTS)); then
    [[ -n "${KEEP:-}" ]] || delete
    exit "$code"
  fi
  echo "$0: the run ended with $code; start $((restart + 2)) of at most $((MAX_RESTARTS + 1))" >&2
  sleep "$POLL_SECONDS"
done
