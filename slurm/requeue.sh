# shellcheck shell=bash
# Shared by all batch scripts of this folder, which source it in the folder that sbatch was called in.
#
#   step [SRUN OPTIONS] COMMAND...   run COMMAND as a job step, in all tasks of the job, and return when it has finished.
#                                    If it was told to stop and has saved its state: requeue the job, and exit.
#
# Slurm tells a job step to stop by a signal: SIGUSR1 some time before the time limit (#SBATCH --signal=USR1@120),
# SIGTERM when a partition or QOS with a higher priority takes the machine (PreemptMode=REQUEUE with a GraceTime). Both
# reach the tasks of the step on all nodes, but not the batch script. Therefore --signal has no "B:", which would signal
# the script alone, and srun starts everything, even a single process: otherwise Slurm would not signal it. The Python
# scripts then save at the current step and exit with code 75; with --resume they continue from there.

PYTHON=${PYTHON:-.venv/bin/python}
CHECKPOINTS=${CHECKPOINTS:-checkpoints}
MAX_RESTARTS=${MAX_RESTARTS:-50} # so that a job that makes no progress does not run for ever

SAVED=75               # "saved: the same command with --resume goes on"
UNREADY="138 143"      # ended by SIGUSR1 or SIGTERM before Python could catch it: nothing to save yet

# Since Slurm 22.05 srun does not take this from sbatch by itself.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
# For --workers in the batch scripts: its default would be all cores of the node.
# shellcheck disable=SC2034
THREADS=$SRUN_CPUS_PER_TASK

step() {
    local running signalled=yes code
    # Tasks that stop together end a moment apart, so the first to end must not kill the others at once; but a task that
    # waits for a crashed task must not wait for ever.
    srun --kill-on-bad-exit=0 --wait=300 "$@" &
    running=$!
    # Some clusters signal the script too, or only it (B:, PreemptParameters=send_user_signal): pass it on. srun passes
    # SIGUSR1 to all tasks.
    trap 'signalled=yes; kill -USR1 "$running" 2>/dev/null || true' USR1 TERM
    while [ -n "$signalled" ]; do # a wait that a signal interrupted says nothing about srun
        signalled='' code=0
        wait "$running" || code=$?
    done
    trap - USR1 TERM
    case " $SAVED $UNREADY " in
    *" $code "*) requeue "$code" ;;
    esac
    [ "$code" -eq 0 ] || exit "$code"
}

requeue() {
    # The job id of an array's last task is that of the whole array, which would then be requeued: name the task.
    local job=$SLURM_JOB_ID state
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    state=$(scontrol show job --oneliner "$job" | grep -oE '(JobState|Reason)=[^ ]+' | xargs)
    case $state in
    # RUNNING: told to stop in time. COMPLETING for TimeLimit: the limit came while no step was running.
    "JobState=RUNNING "* | "JobState=COMPLETING Reason=TimeLimit") ;;
    *)
        # Cancelled, and requeueing would bring it back; or Slurm is requeueing it already.
        echo "not requeued: $state"
        exit "$1"
        ;;
    esac
    if [ "${SLURM_RESTART_COUNT:-0}" -ge "$MAX_RESTARTS" ]; then
        echo "not requeued: $MAX_RESTARTS restarts (MAX_RESTARTS)"
        exit "$1"
    fi
    echo "requeued: $job"
    scontrol requeue "$job"
    exit "$1"
}
