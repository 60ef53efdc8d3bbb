#!/usr/bin/env bash
# Trains on several nodes of a Slurm cluster, one process on each node.
#
#   CONFIG=imagenet WORKDIR=/shared/xception DATA_DIR=/shared/tfds sbatch launch/slurm.sh [--config.FIELD=VALUE ...]
#
# Add what your cluster asks for, such as --partition and --account, to the command or to the lines below.
# All nodes must see WORKDIR, DATA_DIR and the directory of this command, and find xception-jax on their PATH.
# On nodes without GPUs: sbatch --gpus-per-node=0 launch/slurm.sh
#SBATCH --job-name=xception
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@180
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.txt
set -euo pipefail

CONFIG="${CONFIG:-imagenet}"
WORKDIR="${WORKDIR:-runs/$CONFIG}"
DATA_DIR="${DATA_DIR:-}" # where `xception-jax prepare` put the dataset; empty for that of the config
MAX_RESTARTS="${MAX_RESTARTS:-100}"

# Three minutes before the time is over, Slurm sends SIGTERM to the tasks (--signal), and they save and end with 75.
# A cluster may send it to this script too, which must live long enough to requeue the job.
trap : TERM

# The tasks end together by themselves: srun must not kill those that still save when the first one has ended.
code=0
srun --kill-on-bad-exit=0 --wait=0 --cpu-bind=none \
  xception-jax train --config="$CONFIG" --workdir="$WORKDIR" ${DATA_DIR:+--config.data.data_dir="$DATA_DIR"} "$@" || code=$?

# 74: a disk or network failed, 75: stopped and saved, above 128: killed. All others would fail again.
# Slurm itself requeues the job after a failure of a node and after a preemption. A job that `scancel` ends does not run
# any more.
state="$(squeue --noheader --jobs="$SLURM_JOB_ID" --format=%T || true)"
if [[ "$state" == RUNNING ]] && ((code == 74 || code == 75 || code > 128)) && ((${SLURM_RESTART_COUNT:-0} < MAX_RESTARTS)); then
  echo "$0: the run ended with $code; requeued"
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
