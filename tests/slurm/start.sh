#!/bin/bash
# Starts a Slurm cluster of two nodes on this machine, and installs Slurm first where it is missing (Debian, Ubuntu):
#
#   tests/slurm/start.sh DIRECTORY
#   export SLURM_CONF=DIRECTORY/slurm.conf
#   srun -N2 hostname
#   tests/slurm/stop.sh DIRECTORY
#
# Everything the cluster writes is below DIRECTORY. Needs root, or sudo. A cluster that runs there already is left as it
# is.
# PROCTRACK is how Slurm keeps track of processes. With linuxproc, which works everywhere and is the default, signals go
# to all processes of a job; with cgroup, as on most clusters, only to those that Slurm itself started.

set -euo pipefail
directory=$(realpath "$1")
export SLURM_CONF=$directory/slurm.conf
root=
((EUID == 0)) || root=sudo

if ! command -v munged slurmctld slurmd srun > /dev/null; then
    $root apt-get -qq update
    $root env DEBIAN_FRONTEND=noninteractive apt-get -qq install --no-install-recommends \
        munge slurm-client slurmctld slurmd > /dev/null
fi

[[ -e $SLURM_CONF ]] && scontrol ping > /dev/null 2>&1 && exit

mkdir -p "$directory/state"
host=$(hostname -s)
cat > "$SLURM_CONF" << END
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=17000
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$directory/munge.socket
MpiDefault=none
ProctrackType=proctrack/${PROCTRACK:-linuxproc}
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
ReturnToService=2
# Finished jobs can be looked at for an hour.
MinJobAge=3600
StateSaveLocation=$directory/state
SlurmctldPidFile=$directory/slurmctld.pid
SlurmctldLogFile=$directory/slurmctld.log
SlurmdSpoolDir=$directory/spool.%n
SlurmdPidFile=$directory/slurmd.%n.pid
SlurmdLogFile=$directory/slurmd.%n.log
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=17001 CPUs=1
NodeName=n2 NodeHostname=$host NodeAddr=127.0.0.1 Port=17002 CPUs=1
# Several jobs may share a node.
PartitionName=test Nodes=n1,n2 Default=YES OverSubscribe=FORCE:4
END
# Slurm reads it whenever processes are tracked by cgroup.
echo ConstrainCores=no > "$directory/cgroup.conf"

# A key, a socket and files of its own: a munged of this machine is not touched.
head -c 1024 /dev/urandom | $root tee "$directory/munge.key" > /dev/null
$root chmod 600 "$directory/munge.key"
$root munged --force --key-file="$directory/munge.key" --seed-file="$directory/munge.seed" \
    --socket="$directory/munge.socket" --pid-file="$directory/munged.pid" --log-file="$directory/munged.log" \
    2> /dev/null
$root slurmctld -c -f "$SLURM_CONF"
$root slurmd -N n1 -f "$SLURM_CONF"
$root slurmd -N n2 -f "$SLURM_CONF"

for ((second = 0; second < 120; second++)); do
    [[ $(sinfo --noheader --format=%t 2> /dev/null) == idle ]] && exit
    sleep 1
done
echo "$0: two nodes are not idle after 120 s:" >&2
sinfo >&2 || true
$root tail -n 5 "$directory"/*.log >&2
exit 1
