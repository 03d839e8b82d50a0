#!/usr/bin/env bash
# A real Slurm of two nodes on this one machine, for tests and for trying things out:
#
#   eval "$(scripts/slurm/test_cluster.sh start)"    # sets SLURM_CONF; then sinfo, sbatch, srun, scancel as usual
#   scripts/slurm/test_cluster.sh stop
#
# Needs root on Debian or Ubuntu; installs slurm-wlm and munge where they are missing. Nodes n1 and n2 have 4 cores each, whatever
# the machine has. Partition "low" is preempted by "high": a job is told with the signal of its --signal option, has
# 60 seconds, and is requeued.

set -euo pipefail

folder="${FSDP_DP_TEST_CLUSTER:-/tmp/fsdp_dp-test-cluster}"
cores=4

say() { printf '[test cluster] %s\n' "$*" >&2; }

fail() {
  say "error: $*"
  exit 1
}

install_slurm() {
  command -v slurmctld slurmd munged >/dev/null && return
  command -v apt-get >/dev/null || fail "slurmctld, slurmd or munged is missing, and there is no apt-get to install them with"
  say "installing slurm-wlm and munge"
  { apt-get update && DEBIAN_FRONTEND=noninteractive apt-get install -y slurm-wlm munge; } >"$folder/install.log" 2>&1 ||
    fail "apt-get could not install slurm-wlm and munge: see $folder/install.log"
}

# Credentials that expire in 5 seconds make a requeue take 8 seconds; with the usual 120 it waits two minutes.
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
SlurmctldPort=26817
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
SchedulerParameters=bf_interval=2,sched_interval=2,batch_sched_delay=0
SlurmctldParameters=preempt_send_user_signal
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
KillWait=20
MinJobAge=3600
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=26818 CPUs=$cores
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=26819 CPUs=$cores
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
  local attempt
  for attempt in {1..120}; do
    [[ "$(sinfo --noheader --Node --partition=low --states=idle --format=%N 2>/dev/null | sort -u | wc -l)" == 2 ]] && return
    sleep 0.25
  done
  fail "the nodes did not come up within 30 seconds (attempt $attempt): see $folder/*.log"
}

start() {
  [[ "$(id -u)" == 0 ]] || fail "Slurm's daemons need root here, found user $(id -un)"
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

is_running() {
  [[ -s "$folder/slurmctld.pid" ]] && kill -0 "$(<"$folder/slurmctld.pid")" 2>/dev/null
}

stop() {
  local file pid
  for file in "$folder"/slurmd-*.pid "$folder"/slurmctld.pid "$folder"/munged.pid; do
    [[ -s "$file" ]] || continue
    pid="$(<"$file")"
    kill "$pid" 2>/dev/null || true
    while kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
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
