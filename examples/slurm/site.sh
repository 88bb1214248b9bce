# What a site needs around train.sbatch: copy it, keep what you need, and submit with
#
#   SITE=my_site.sh sbatch examples/slurm/train.sbatch --config my_run.yaml
#   sbatch --export=SITE=my_site.sh examples/slurm/train.sbatch --config my_run.yaml    # where SBATCH_EXPORT=NONE
#
# The batch script reads it on the job's first node, at each start of the job, before anything else is started. All
# tasks get what it exports. A command that fails ends the job with that command's status; it is not requeued.

# The environment. A job that inherits none (SBATCH_EXPORT=NONE) has nothing else.
# module load cuda/12.8
# source .venv/bin/activate

# Data from a shared file system to the disks of each node.
# srun --ntasks-per-node=1 rsync --archive /shared/data/ /local/data/

# More options of srun, for all tasks.
# srun_options+=(--mpi=none --cpu-bind=none)

# A container. With pyxis, which mounts and starts it; or a command in front of each task, as for apptainer:
# srun_options+=(--container-image=gspo_megatron.sqsh --container-mounts="$PWD:$PWD" --container-workdir="$PWD")
# in_container=(apptainer exec --nv --bind "$PWD" --pwd "$PWD" gspo_megatron.sif)

# More options of torchrun: here, what each process prints in a file of its own, besides the job's log.
# torchrun_options+=(--log-dir "logs/$job" --tee 3)

# NCCL finds its network by itself. On nodes with several it may choose the wrong one to bootstrap: docs/slurm.md.
# export NCCL_SOCKET_IFNAME=ib0

# Called when the job ends, or is about to be requeued; not when Slurm ends it (scancel, a preemption without grace time).
# after_job() { # exit status, `requeued` or `ended`
#     curl --silent --data "$job: exit status $1, $2" https://chat.example.org/hook
# }
