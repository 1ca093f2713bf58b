#!/usr/bin/env bash
# Checks the batch scripts on a real Slurm of one node, this machine:
#
#   slurm/test/run.sh
#
# As root on Debian or Ubuntu; installs slurm-wlm and munge if they are not there. Takes some five minutes on two cores.
# PYTHON names the interpreter (default: .venv/bin/python); KEEP=1 leaves the folder with all logs.
#
# What happens: a victim is trained by two processes, a job array steals it and judges the copies, and so do two processes
# by the ImageNet script, on small images; each is preempted on the way by a job of another partition. One more copy runs
# into its time limit, and one job is cancelled. check.py then says whether everything went on where it had stopped,
# whether anything was done or paid for twice, and what is missing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. slurm/test/cluster.sh

[ "$(id -u)" -eq 0 ] || { echo "error: this starts Slurm's daemons: run it as root" >&2; exit 2; }
PYTHON=$(realpath -s "${PYTHON:-.venv/bin/python}")
"$PYTHON" -c "import torch" || { echo "error: $PYTHON has no torch: run make setup, or set PYTHON" >&2; exit 2; }
cluster_install

folder=$(mktemp -d /tmp/slurm-check.XXXXXX)
finish() {
    local code=$?
    trap - EXIT
    cluster_stop
    if [ -n "${KEEP:-}" ]; then echo "kept: $folder"; else rm -rf "$folder"; fi
    exit "$code"
}
trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM

say() { printf '%3d s  %s\n' "$SECONDS" "$*"; }

cluster_start "$folder/cluster"
say "$(sinfo --version), one node with two CPUs"

# ---- what the jobs are -----------------------------------------------------------------------------------------------

export PYTHON CHECKPOINTS=$folder/checkpoints
export DATASET=shapes STEAL=textures ARCH=resnet10w32 VICTIM_EPOCHS=8 LOSSES="mse infonce" BUDGETS="320 512" SEEDS="0 1"
export EVAL_FLAGS="--num-labeled 200 --num-test 200 --probe-epochs 5"
getent hosts "$(hostname -s)" >/dev/null || export MASTER_ADDR=127.0.0.1 # a container without its own name

# submit [SBATCH OPTIONS] SCRIPT [FLAGS]: the job's number.
submit() {
    sbatch --parsable --gres=none --cpus-per-task=1 --output="$folder/%x-%A_%a.out" "$@"
}

# preempt: a job that needs the whole node, in the partition that goes first.
preempt() {
    sbatch --parsable --partition=high --exclusive --job-name=urgent --output=/dev/null --wrap "sleep 2" >/dev/null
}

# said PATTERN JOB: whether a job's output, or that of one of an array's tasks, has such a line.
said() { cat "$folder"/*-"$2"_*.out 2>/dev/null | grep -qE "$1"; }

ended() { [ -z "$(squeue --noheader --job="$1" 2>/dev/null)" ]; }

restarted() { scontrol show job --oneliner "$1" | grep -qE ' Restarts=[1-9]'; }

# await SECONDS WHAT COMMAND...: until the command succeeds.
await() {
    local seconds=$1 what=$2
    shift 2
    _until "$seconds" "$@" && return
    echo "error: after $seconds s not yet: $what" >&2
    squeue >&2
    tail -n 15 "$folder"/*.out >&2
    exit 1
}

# ---- preemption ------------------------------------------------------------------------------------------------------

victim=$(EPOCHS=$VICTIM_EPOCHS submit --ntasks=2 slurm/victim.sbatch --num-train 512 --batch-size 64)
await 90 "the victim's second epoch" said '^epoch 2/' "$victim"
preempt
say "victim, two processes: preempted after its second epoch"
await 120 "the victim" ended "$victim"
say "victim: finished"

cells=$(bash slurm/array.sbatch 2>/dev/null)
array=$(EPOCHS=9 submit --array="$cells" slurm/array.sbatch --batch-size 32)
await 90 "an epoch of a copy" said '^epoch 3/' "$array"
preempt
say "array $cells: two of its tasks preempted"
await 300 "the array" ended "$array"
say "array: finished"

large=$(VICTIM=$(ls "$CHECKPOINTS"/victim*/checkpoint.pth.tar) QUERIES=128 TEST=shapes \
    EVAL_FLAGS="--arch resnet18 --size 32 --epochs 3" submit --ntasks-per-node=2 slurm/imagenet-1x4.sbatch \
    --dataset shapes --archstolen resnet18 --size 32 --batch-size 32 --epochs 5)
await 120 "an epoch of the ImageNet script" said '^epoch 2/' "$large"
preempt
say "ImageNet script, two processes: preempted after its second epoch"
await 240 "the ImageNet script" ended "$large"
say "ImageNet script: finished"

# ---- time limit, cancellation ----------------------------------------------------------------------------------------

# A minute's work, or the time limit would come too late. Slurm looks at limits every half minute.
epochs=$("$PYTHON" slurm/test/check.py epochs-in 60 512 "$CHECKPOINTS")
limited=$(EPOCHS=$epochs LOSS=mse QUERIES=512 submit --job-name=limited --time=1 --signal=USR1@10 slurm/steal.sbatch \
    --batch-size 32)
cancelled=$(EPOCHS=500 LOSS=mse QUERIES=512 SEED=7 submit --job-name=cancelled slurm/steal.sbatch)
await 60 "an epoch of the job to be cancelled" said '^epoch 1/' "$cancelled"
scancel "$cancelled"
say "a job cancelled"
await 60 "the cancelled job's end" ended "$cancelled"
judged=$(MODEL=victim submit --job-name=judged slurm/linear_eval.sbatch --num-labeled 200 --num-test 200 --probe-epochs 5)
await 120 "the job with a time limit of a minute, requeued" restarted "$limited"
say "time limit: warned and requeued"
scontrol update JobId="$limited" TimeLimit=60
await 180 "its end" ended "$limited"
await 60 "the victim's judgement" ended "$judged"

say "all jobs ended"
scontrol show job --oneliner >"$folder/jobs"
"$PYTHON" slurm/test/check.py jobs "$folder"
