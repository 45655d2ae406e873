#!/bin/bash
# A training on Slurm, one Ray node on each of its machines. From a checkout that all of them see, with its .venv:
#
#     sbatch --nodes 2 --cpus-per-task 8 deploy/slurm.sh --num-workers 4 --storage-path /shared/runs
#
# What follows the script's name goes to jobs/train.py. Lines appear in mnist-ray-JOB.log. After `scancel`, or the end of
# the allotted time, the run goes on with --resume --run-name NAME.
#SBATCH --job-name mnist-ray
#SBATCH --output %x-%j.log
#SBATCH --ntasks-per-node 1
#SBATCH --time 01:00:00
set -euo pipefail
source .venv/bin/activate

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
addresses=$(srun --nodes 1 --ntasks 1 --nodelist "${hosts[0]}" hostname --ip-address)
address=${addresses%% *}

# Starts Ray everywhere, waits for all nodes, runs the job on the first and stops Ray again.
srun ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$SLURM_CPUS_PER_TASK" -- python jobs/train.py "$@"
