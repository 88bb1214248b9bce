#!/bin/bash
# Ends the cluster that start.sh started: tests/slurm/stop.sh DIRECTORY. Its jobs are cancelled; DIRECTORY stays.

set -euo pipefail
directory=$(realpath "$1")
export SLURM_CONF=$directory/slurm.conf
root=
((EUID == 0)) || root=sudo

squeue --noheader --format=%A 2> /dev/null | xargs --no-run-if-empty $root env SLURM_CONF="$SLURM_CONF" scancel
for ((second = 0; second < 60; second++)); do
    [[ -z $(squeue --noheader 2> /dev/null) ]] && break
    sleep 1
done
for daemon in slurmd.n1 slurmd.n2 slurmctld munged; do
    file=$directory/$daemon.pid
    [[ -e $file ]] || continue
    pid=$(< "$file")
    $root kill "$pid"
    # A process that has ended may stay a zombie for a while.
    for ((tenth = 0; tenth < 300; tenth++)); do
        [[ $(ps -o state= -p "$pid") == [!Z] ]] || break
        sleep 0.1
    done
done
