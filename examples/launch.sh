#!/bin/bash
# torchrun, as a scheduler needs it: bash examples/launch.sh --nproc_per_node 8 -m gspo_megatron.train --config run.yaml
#
# - Signals. A scheduler signals only this shell. torchrun would exit on USR1, and kill its processes 30 s after TERM.
#   Instead they get USR1 on either signal, and save, while torchrun, which ignores USR1, waits for them.
# - Exit status. torchrun exits with 1 whatever its processes exit with. This script exits with the status of the first
#   of them to exit: 0, 2, 70, 75 (docs/operating.md). A process that is killed has none; then it is torchrun's.
#
# train.sbatch and kubernetes/job.yaml start it on every node. Needs bash, and pkill of the package procps.

set -uo pipefail

if ! command -v pkill > /dev/null; then
    echo "launch.sh: there is no pkill, so the run could not be told to save; install the package procps" >&2
    exit 2
fi

# The processes write it (gspo_megatron/train.py). A batch script that names a file for all nodes reads that itself.
own=
if [[ -z ${GSPO_STATUS_FILE:-} ]]; then
    own=$(mktemp -d) || exit
    export GSPO_STATUS_FILE=$own/status
    trap 'rm -rf "$own"' EXIT
fi

trap 'pkill -USR1 -P "$torchrun"' USR1 TERM
# In a terminal Ctrl-C reaches the processes by itself.
trap : INT
(trap '' USR1 && exec torchrun "$@") &
torchrun=$!
# A signal interrupts `wait`.
while kill -0 "$torchrun" 2> /dev/null; do wait "$torchrun"; done
wait "$torchrun"
status=$?
if ((status != 0)) && [[ -n $own && -s $GSPO_STATUS_FILE ]]; then status=$(< "$GSPO_STATUS_FILE"); fi
exit "$status"
