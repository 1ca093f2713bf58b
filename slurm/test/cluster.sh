# shellcheck shell=bash
# A Slurm cluster of one node, this machine, with a private configuration, ports, munge socket and state: nothing of an
# installed Slurm is read or changed. Sourced by run.sh; needs root.
#
#   cluster_start FOLDER     everything of it lies in FOLDER; exports SLURM_CONF, so that sbatch & co. talk to it
#   cluster_stop             ends the daemons that were started here, and what still runs in jobs

cluster_install() {
    local missing=()
    command -v slurmctld >/dev/null && command -v slurmd >/dev/null || missing+=(slurm-wlm)
    command -v munged >/dev/null || missing+=(munge)
    [ ${#missing[@]} -eq 0 ] && return
    echo "installing ${missing[*]}"
    DEBIAN_FRONTEND=noninteractive apt-get update -qq >/dev/null
    DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "${missing[@]}" >/dev/null
}

cluster_start() {
    cluster=$1
    export SLURM_CONF=$cluster/slurm.conf
    mkdir -p "$cluster"/{state,spool,munge}
    # Two ports and a munge socket that no installed Slurm uses.
    local port=$((12000 + RANDOM % 7000))
    _write_configuration "$port"

    dd if=/dev/urandom of="$cluster/munge/key" bs=1024 count=1 status=none
    chmod 400 "$cluster/munge/key"
    # --force: it need not mind that its socket's folder belongs to root.
    munged --foreground --force --socket="$cluster/munge/socket" --key-file="$cluster/munge/key" \
        --pid-file="$cluster/munge/pid" --log-file="$cluster/munge/log" --seed-file="$cluster/munge/seed" \
        2>"$cluster/munge/stderr" &
    cluster_pids=($!)
    _until 20 test -S "$cluster/munge/socket" || _failed "munged did not start" "$cluster/munge/log"
    slurmctld -D -f "$SLURM_CONF" >"$cluster/slurmctld.out" 2>&1 &
    cluster_pids+=($!)
    _until 20 scontrol ping >/dev/null || _failed "slurmctld did not start" "$cluster/slurmctld.log"
    slurmd -D -f "$SLURM_CONF" -N "$(_node)" >"$cluster/slurmd.out" 2>&1 &
    cluster_pids+=($!)
    _until 30 _idle || _failed "the node did not become idle" "$cluster/slurmd.log"
}

cluster_stop() {
    [ -n "${cluster_pids:-}" ] || return 0
    # Jobs first: slurmd leaves their processes (slurmstepd) alone when it ends.
    scancel --user=root --signal=KILL --full 2>/dev/null || true
    scancel --user=root 2>/dev/null || true
    _until 20 _empty || true
    local i
    for ((i = ${#cluster_pids[@]} - 1; i >= 0; i--)); do
        kill "${cluster_pids[i]}" 2>/dev/null || true
        wait "${cluster_pids[i]}" 2>/dev/null || true
    done
    cluster_pids=()
}

_node() { hostname -s; }

_idle() { [ "$(sinfo --noheader --partition=low --format=%t 2>/dev/null)" = idle ]; }

_empty() { [ -z "$(squeue --noheader 2>/dev/null)" ]; }

# _until SECONDS COMMAND...: whether the command succeeds within that time.
_until() {
    local end=$((SECONDS + $1))
    shift
    until "$@" 2>/dev/null; do
        [ $SECONDS -lt $end ] || return 1
        sleep 0.5
    done
}

_failed() {
    echo "error: $1" >&2
    tail -n 20 "$2" >&2 || true
    exit 1
}

_write_configuration() {
    cat >"$SLURM_CONF" <<CONF
ClusterName=check
SlurmctldHost=$(_node)(127.0.0.1)
SlurmctldPort=$1
SlurmdPort=$(($1 + 1))
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
CryptoType=crypto/munge
# A requeued job waits for cred_expire seconds before it starts again (120 if nothing is said).
AuthInfo=socket=$cluster/munge/socket,cred_expire=5
StateSaveLocation=$cluster/state
SlurmdSpoolDir=$cluster/spool
SlurmctldPidFile=$cluster/slurmctld.pid
SlurmdPidFile=$cluster/slurmd.pid
SlurmctldLogFile=$cluster/slurmctld.log
SlurmdLogFile=$cluster/slurmd.log
# Said of a preemption in 22.05: debug.
SlurmctldDebug=debug
SlurmdDebug=info
# No control groups and no accounting: containers seldom have the first, and the second needs a database.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
KillWait=10
MinJobAge=3600
MailProg=/bin/true
# Cores are what is shared out, in order of arrival with backfill; partition "high" preempts partition "low".
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=5,bf_interval=5
PriorityType=priority/basic
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
# Always two CPUs, so that what waits for what is the same on every machine.
NodeName=$(_node) NodeAddr=127.0.0.1 CPUs=2 State=UNKNOWN
PartitionName=low Nodes=$(_node) Default=YES MaxTime=INFINITE State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=$(_node) MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
CONF
    # Read only where a plugin asks for it; a slurmd of 22.05 or later may, and there is no systemd to talk to.
    printf 'IgnoreSystemd=yes\n' >"$cluster/cgroup.conf"
}
