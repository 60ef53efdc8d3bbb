#!/usr/bin/env bash
# Trains on a Cloud TPU slice: requests it, installs this repository on its workers, starts the run on all of them, and
# deletes the slice in the end. If a spot slice is taken away, a new one is requested and the run goes on.
#
#   NAME=xception ZONE=us-west4-a TYPE=v5litepod-64 WORKDIR=gs://my-bucket/xception DATA_DIR=/data/tfds \
#     bash launch/tpu_vm.sh [--config.FIELD=VALUE ...]
#
# Run it in the repository, on a machine that stays on, for example in tmux on a small VM. If it is stopped, the request
# and the run go on; start it again to follow. It deletes the slice when the run has ended, unless KEEP=1 is set. If the
# installation fails, the slice is kept: fix the cause and start again.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

NAME="${NAME:-xception}" # of the queued resource and of the slice; a second run at the same time needs another one
ZONE="${ZONE:?such as us-west4-a}"
TYPE="${TYPE:-v5litepod-64}"
RUNTIME="${RUNTIME:-v2-alpha-tpuv5-lite}" # v4: tpu-ubuntu2204-base, v5p: v2-alpha-tpuv5, v6e: v2-alpha-tpuv6e
CAPACITY="${CAPACITY:---spot}"            # or --guaranteed, --reserved
CONFIG="${CONFIG:-imagenet}"
WORKDIR="${WORKDIR:?such as gs://my-bucket/xception; the disks of the workers end with the slice}"
DATA_DIR="${DATA_DIR:-}"   # where every worker finds the dataset
DATA_DISK="${DATA_DISK:-}" # a disk to attach read-only, such as projects/my-project/zones/us-west4-a/disks/tfds
SETUP="${SETUP:-true}"     # what every new worker runs once, such as 'gcsfuse --implicit-dirs my-data-bucket /data'
read -ra create_flags <<<"${CREATE_FLAGS:-}" # more options of gcloud, such as --network=... --internal-ips
read -ra ssh_flags <<<"${SSH_FLAGS:-}"       # such as --internal-ip, or --tunnel-through-iap
MAX_RESTARTS="${MAX_RESTARTS:-100}"
POLL_SECONDS="${POLL_SECONDS:-30}"

# Codes of commands on workers, unlike those of the program and of gcloud.
BUG=101 NOT_SET_UP=102 OTHER_COMMIT=103

costs() { # says how to delete what may cost money
  echo "  gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force" >&2
}

stopped() { # leaves the request, the slice and the run alone
  echo "$0: stopped. Start again to follow the run. The slice costs, now or once it is granted, until you delete it:" >&2
  costs
  exit 130
}
trap stopped INT TERM

# gcloud would ask for a passphrase of a new key once the slice is there and costs, and it refuses to copy to several
# workers if there is an ssh-agent without this key.
key=~/.ssh/google_compute_engine
[[ -e "$key" ]] || { mkdir -p -m 700 ~/.ssh && ssh-keygen -q -t rsa -N '' -f "$key"; }
if [[ -n "${SSH_AUTH_SOCK:-}" && -e "$key" ]]; then ssh-add -q "$key"; else unset SSH_AUTH_SOCK; fi

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

known="" # whether a request was ever accepted: then a failure of another one is no mistake in the variables above
untried="" # whether the last request is of this script and was never granted: then its failure may be a mistake
create() {
  gcloud compute tpus queued-resources create "$NAME" --node-id="$NAME" --zone="$ZONE" \
    --accelerator-type="$TYPE" --runtime-version="$RUNTIME" "$CAPACITY" \
    ${DATA_DISK:+"--data-disk=source=$DATA_DISK,mode=read-only"} ${create_flags[@]+"${create_flags[@]}"} || [[ -n "$known" ]] || exit
  [[ -n "$known" ]] || untried=1
  known=1
}

delete() {
  gcloud compute tpus queued-resources delete "$NAME" --zone="$ZONE" --force --quiet
}

on_all_workers() { # returns the first code that is not 0; 255 if a worker cannot be reached, or gcloud itself failed
  local code=0
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"} \
    --ssh-flag=-oConnectTimeout=15 --ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4 \
    --command="$1" || code=$?
  ((code != 1)) || code=255
  return "$code"
}

wait_for_slice() { # requests one if there is none, and waits, for days if need be
  local now last=""
  while true; do
    now="$(state)"
    [[ "$now" == "$last" ]] || echo "$0: the slice $NAME: $now" >&2
    last="$now"
    case "$now" in
      ACTIVE) known=1 untried="" && return ;;
      NONE) create ;;
      FAILED)
        if [[ -n "$untried" ]]; then
          echo "$0: the request failed. This command says why; then delete the request:" >&2
          echo "  gcloud compute tpus queued-resources describe $NAME --zone=$ZONE" >&2
          costs
          exit 1
        fi
        delete || true ;;
      SUSPENDING | SUSPENDED) delete || true ;; # a spot slice that was taken away
    esac
    sleep "$POLL_SECONDS"
  done
}

finish() { # deletes the slice and ends with the code of the run; a slice that is left would cost on
  [[ -z "${KEEP:-}" ]] || exit "$1"
  for _ in {1..10}; do
    if delete || [[ "$(state)" == NONE ]]; then exit "$1"; fi
    sleep "$POLL_SECONDS"
  done
  echo "$0: the run ended with $1, and the slice could not be deleted; it costs until it is:" >&2
  costs
  exit "$(($1 == 0 ? 74 : $1))"
}

# Installs the commit with a Python that is new enough and the versions of requirements.lock, so that a slice of next
# month trains with the same packages. The lock is that of the run; SETUP must not inherit it for its daemons.
install() {
  git archive --format=tar.gz --output="$archive" "$commit" &&
    gcloud compute tpus tpu-vm scp "$archive" "$NAME:" --zone="$ZONE" --worker=all ${ssh_flags[@]+"${ssh_flags[@]}"} \
      --scp-flag=-oConnectTimeout=15 || return 255
  on_all_workers "exec 9>~/run.lock && flock 9 &&
    { test -e ~/set_up || { (
      $SETUP
    ) 9>&- && touch ~/set_up; }; } &&
    tar -xzOf ~/xception_jax.tar.gz requirements.lock > ~/requirements.lock &&
    pip install --quiet --user uv && ~/.local/bin/uv venv --quiet --clear --python=3.12 ~/venv &&
    ~/.local/bin/uv pip install --quiet --python ~/venv/bin/python --constraint ~/requirements.lock \
      \"xception_jax[tpu,cloud] @ file://\$HOME/xception_jax.tar.gz\" &&
    echo $commit > ~/installed || exit $NOT_SET_UP"
}

commit="$(git rev-parse HEAD)"
archive="$(mktemp -d)/xception_jax.tar.gz"
# If the connection is lost, the run goes on: tee -p still reads what it prints. flock makes the next start wait for it.
printf -v train ' %q' train --config="$CONFIG" --workdir="$WORKDIR" ${DATA_DIR:+--config.data.data_dir="$DATA_DIR"} "$@"
train="set -o pipefail; flock ~/run.lock ~/venv/bin/xception-jax$train 2>&1 | tee -p -a ~/run.log
code=\$?; test \$code != 1 || code=$BUG; exit \$code"

for ((restart = 0; ; restart++)); do
  wait_for_slice
  code=0
  on_all_workers "test \"\$(cat ~/installed 2>/dev/null)\" = $commit || exit $OTHER_COMMIT" || code=$?
  ((code != OTHER_COMMIT)) || { code=0 && install || code=$?; }
  if ((code == NOT_SET_UP)); then
    echo "$0: SETUP or the installation failed. The slice is kept: start again, or delete it, which costs until then:" >&2
    costs
    exit 1
  fi
  ((code != 0)) || on_all_workers "$train" || code=$?
  ((code != BUG)) || code=1

  # 74: a disk or network failed, 75: stopped and saved, above 128: killed. All others would fail again.
  if ! ((code == 74 || code == 75 || code > 128)) || ((restart >= MAX_RESTARTS)); then
    finish "$code"
  fi
  echo "$0: the run ended with $code; start $((restart + 2)) of at most $((MAX_RESTARTS + 1))" >&2
  sleep "$POLL_SECONDS"
done
