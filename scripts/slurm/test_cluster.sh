#!/usr/bin/env bash
# A real Slurm of two nodes on this one machine, for tests and for trying things out:
#
#   eval "$(scripts/slurm/test_cluster.sh start)"    # sets SLURM_CONF; then sinfo, sbatch, srun, scancel as usual
#   scripts/slurm/test_cluster.sh stop
#
# Needs root on Debian or Ubuntu; installs slurm-wlm and munge where they are missing, and ends with status 77 where it
# cannot. Nodes n1 and n2 have 4 cores each, whatever the machine has. Partition "low" is preempted by "high": a job is told
# with the signal of its --signal option, has 60 seconds, and is requeued.
#
# FSDP_DP_TEST_CLUSTER names the cluster's folder and FSDP_DP_TEST_CLUSTER_PORT the first of its three ports: two clusters on
# one machine need different ones.

set -euo pipefail

folder="${FSDP_DP_TEST_CLUSTER:-/tmp/fsdp_dp-test-cluster}"
port="${FSDP_DP_TEST_CLUSTER_PORT:-26817}"
cores=4
cannot=77 # the exit status where no cluster is possible here

say() { printf '[test cluster] %s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

impossible() {
  say "no Slurm here: $*"
  exit "$cannot"
}

# Without a network, apt-get is to give up within seconds.
apt() {
  DEBIAN_FRONTEND=noninteractive timeout 300 apt-get -o Acquire::Retries=0 -o Acquire::http::Timeout=10 \
    -o Acquire::https::Timeout=10 -o DPkg::Lock::Timeout=60 "$@"
}

install_slurm() {
  command -v slurmctld >/dev/null && command -v slurmd >/dev/null && command -v munged >/dev/null && return
  command -v apt-get >/dev/null || impossible "slurmctld, slurmd or munged is missing, and there is no apt-get to install them with"
  say "installing slurm-wlm and munge"
  { apt update && apt install -y --no-install-recommends slurm-wlm munge; } >"$folder/install.log" 2>&1 ||
    impossible "apt-get could not install slurm-wlm and munge: $(tail -n 1 "$folder/install.log") (all of it: $folder/install.log)"
}

# Credentials that expire in 5 seconds make a requeue take 8 seconds; with the usual 120 it waits two minutes. Jobs are numbered
# from the port on: what a job derives from its number (a port, a folder) is then not another cluster's.
write_configuration() {
  local host
  host="$(hostname -s)"
  cat >"$folder/slurm.conf" <<CONF
ClusterName=fsdp_dp_test
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
SlurmctldPort=$port
FirstJobId=$port
StateSaveLocation=$folder/state
SlurmctldPidFile=$folder/slurmctld.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdPidFile=$folder/slurmd-%n.pid
SlurmdSpoolDir=$folder/spool-%n
SlurmdLogFile=$folder/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=2
SchedulerParameters=bf_interval=1,sched_interval=1,sched_min_interval=0,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=3600
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=$cores
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 2)) CPUs=$cores
PartitionName=low Nodes=n1,n2 Default=YES PriorityTier=1 GraceTime=60 State=UP
PartitionName=high Nodes=n1,n2 PriorityTier=10 PreemptMode=OFF State=UP
CONF
}

start_munge() {
  if [[ ! -s "$folder/munge.key" ]]; then
    (umask 077 && head -c 1024 /dev/urandom >"$folder/munge.key")
  fi
  # --force: munged minds that root runs it, and who owns the folders above its socket.
  munged --force --socket="$folder/munge.socket" --key-file="$folder/munge.key" --log-file="$folder/munged.log" \
    --pid-file="$folder/munged.pid" --seed-file="$folder/munged.seed"
}

wait_for_nodes() {
  local _
  for _ in {1..480}; do
    [[ "$(sinfo --noheader --Node --partition=low --states=idle --format=%N 2>/dev/null | sort -u | wc -l)" == 2 ]] && return
    sleep 0.25
  done
  fail "the nodes did not come up within 2 minutes: see $folder/*.log"
}

start() {
  [[ "$(id -u)" == 0 ]] || impossible "Slurm's daemons need root here, found user $(id -un)"
  mkdir -p "$folder"/{state,spool-n1,spool-n2}
  chmod 755 "$folder"
  install_slurm
  export SLURM_CONF="$folder/slurm.conf"
  if ! is_running; then
    stop
    write_configuration
    start_munge
    slurmctld -c
    slurmd -N n1
    slurmd -N n2
  fi
  wait_for_nodes
  say "two nodes are up; SLURM_CONF=$SLURM_CONF"
  echo "export SLURM_CONF=$SLURM_CONF"
}

# In a container without an init that reaps them, dead daemons stay as zombies.
is_alive() {
  kill -0 "$1" 2>/dev/null && [[ "$(ps -o stat= -p "$1")" != Z* ]]
}

is_running() {
  [[ -s "$folder/slurmctld.pid" ]] && is_alive "$(<"$folder/slurmctld.pid")"
}

# Steps outlive their slurmd: jobs have to end first.
end_jobs() {
  export SLURM_CONF="$folder/slurm.conf"
  local jobs attempt
  for attempt in {1..50}; do
    jobs="$(squeue --noheader --format=%A 2>/dev/null)" || return 0
    [[ -n "$jobs" ]] || return 0
    # shellcheck disable=SC2086
    scancel --full --signal=KILL $jobs 2>/dev/null || true
    # shellcheck disable=SC2086
    scancel $jobs 2>/dev/null || true
    sleep 0.2
  done
  say "jobs are still there after $attempt attempts to end them: $jobs"
}

stop() {
  local file pid
  ! is_running || end_jobs
  for file in "$folder"/slurmd-*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [[ -s "$file" ]] || continue
    pid="$(<"$file")"
    kill "$pid" 2>/dev/null || true
    while is_alive "$pid"; do sleep 0.1; done
    rm -f "$file"
  done
  rm -rf "$folder/state" "$folder"/spool-n?
  mkdir -p "$folder"/{state,spool-n1,spool-n2}
}

case "${1:-}" in
  start) start ;;
  stop) stop ;;
  *) fail "usage: $0 start|stop" ;;
esac
