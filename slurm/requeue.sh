# shellcheck shell=bash
# What all batch scripts of this folder share; sourced by them, in the folder that sbatch was called in.
#
#   step [SRUN OPTIONS] COMMAND...   run it as a job step, by all tasks of the job. Returns when it has finished. If it was
#                                    told to stop and has saved what it did: put the job back into the queue, and exit.
#
# Slurm tells a job step to stop by a signal: SIGUSR1 some time before the time limit (#SBATCH --signal=USR1@120),
# SIGTERM when a partition or QOS with a higher priority takes the machine (PreemptMode=REQUEUE with a GraceTime). Both go
# to the tasks of the step, on all nodes, and not to the batch script: that is why --signal has no "B:", which would
# signal the script alone, and why everything is started by srun, also a single process: Slurm would not signal it
# otherwise. The Python scripts then save at the current step and exit with code 75, and start there again by --resume.

PYTHON=${PYTHON:-.venv/bin/python}
CHECKPOINTS=${CHECKPOINTS:-checkpoints}
MAX_RESTARTS=${MAX_RESTARTS:-50} # so that a job that never gets anywhere does not go on for ever

SAVED=75               # "saved: the same command with --resume goes on"
UNREADY="138 143"      # ended by SIGUSR1 or SIGTERM before Python was there to catch it: nothing to save yet

# srun does not take this from sbatch by itself since Slurm 22.05.
export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
export OMP_NUM_THREADS=$SRUN_CPUS_PER_TASK
# As the scripts write for --workers; their default would be all cores of the node.
# shellcheck disable=SC2034
THREADS=$SRUN_CPUS_PER_TASK

step() {
    local running signalled=yes code
    # Tasks that stop together end a moment apart, so one that ends must not take the others with it at once; a task
    # that waits for one that crashed must not wait for ever.
    srun --kill-on-bad-exit=0 --wait=300 "$@" &
    running=$!
    # Some clusters signal the script too, or only it (B:, PreemptParameters=send_user_signal): pass it on. srun passes
    # SIGUSR1 to all tasks.
    trap 'signalled=yes; kill -USR1 "$running" 2>/dev/null || true' USR1 TERM
    while [ -n "$signalled" ]; do # a wait that a signal cut short says nothing of srun
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
    # The number of an array's last task is that of the whole array, which would then be requeued: name the task.
    local job=$SLURM_JOB_ID state
    [ -z "${SLURM_ARRAY_TASK_ID:-}" ] || job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    state=$(scontrol show job --oneliner "$job" | grep -oE '(JobState|Reason)=[^ ]+' | xargs)
    case $state in
    # RUNNING: told to stop in time. COMPLETING for TimeLimit: the limit came while no step was there to be told.
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
