# What train.sbatch and train_served.sbatch share: they source it, with the arguments of the training. It sets up the job
# and reads the site's file; `finish` requeues the job, or ends it.

# A job that crashes more often than this in a row is not requeued.
max_crashes=${MAX_CRASHES:-3}

# torchrun exits with 1 whatever its processes exit with. So the first of them to exit writes its status to this file,
# next to the log; one that is killed writes none. The restart count is in the file's name, and in the rendezvous id
# below, so that a requeued job never meets remains of its earlier starts.
job=$SLURM_JOB_NAME-$SLURM_JOB_ID
life=${SLURM_RESTART_COUNT:-0}
export GSPO_STATUS_FILE=$PWD/$job.$life.status

# Where Slurm counts no GPUs: one process per core.
processes=${SLURM_GPUS_ON_NODE:-$SLURM_CPUS_ON_NODE}

export OMP_NUM_THREADS=$((SLURM_CPUS_ON_NODE > processes ? SLURM_CPUS_ON_NODE / processes : 1))
# One hardware queue: kernels start in the order they were issued, so Megatron's communication gets ahead of the matmul
# it is meant to overlap with (GPUs before Blackwell).
export CUDA_DEVICE_MAX_CONNECTIONS=1
# Scales of blockwise FP8 stay float32 numbers, not powers of 2. Transformer Engine reads it when it is imported.
export NVTE_FP8_BLOCK_SCALING_FP32_SCALES=1
# Micro-batches differ in length: segments that grow do not fragment the GPU's memory.
export PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True
# Where sites set SBATCH_EXPORT=NONE, srun would not hand on what is exported here.
export SLURM_EXPORT_ENV=ALL

# One task: launch.sh, whose text goes to the nodes, so that they and containers need no file of this repository.
launch=$(< "${SLURM_SUBMIT_DIR:-$PWD}/examples/launch.sh")

# A new job continues from run.dir, or starts from scratch. checkpoint.load in the arguments applies to its first start.
settings=(checkpoint.load=latest "$@")
if ((life > 0)); then settings+=(checkpoint.load=latest); fi

# What the site adds.
srun_options=() in_container=() torchrun_options=()
if [[ -n ${SITE:-} ]]; then
    echo "$job: $SITE"
    # The functions that load modules often use variables that are not set.
    set +u
    source "$(realpath "$SITE")"
    set -u
fi

# The status of the training: what its first process to exit wrote, or, where none did, the step's, which is given.
training_status() {
    if [[ -s $GSPO_STATUS_FILE ]]; then
        cat "$GSPO_STATUS_FILE"
        rm "$GSPO_STATUS_FILE"
    else
        echo "$1"
    fi
}

# Requeues the job, or ends it, after this status. When Slurm ends the job, by scancel or to requeue it, the script ends
# too, before this point.
finish() {
    local status=$1 crashes
    case $status in
        0 | 2 | 70) # done; a setting, the data or a checkpoint is wrong; a guard stopped the run
            report "$status" "not requeued" ended
            exit "$status"
            ;;
        75) # saved and stopped on request
            rm -f "$job.crashes"
            ;;
        *)
            echo "$(date --iso-8601=seconds) exit status $status" >> "$job.crashes"
            crashes=$(wc -l < "$job.crashes")
            if ((crashes > max_crashes)); then
                report "$status" "crash $crashes in a row, given up" ended
                exit "$status"
            fi
            ;;
    esac
    report "$status" requeued requeued
    scontrol requeue "$SLURM_JOB_ID"
}

# Says how the job goes on, in the log and to the site's after_job.
report() {
    echo "$job: exit status $1, $2"
    if declare -F after_job > /dev/null; then
        after_job "$1" "$3" || echo "$job: after_job failed with $?"
    fi
}
