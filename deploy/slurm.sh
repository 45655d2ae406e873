#!/bin/bash
# Train on Slurm, with a Ray node on each machine. Run it in a checkout with a .venv, in a folder that all machines see:
#
#     sbatch --nodes 2 --cpus-per-task 8 deploy/slurm.sh --num-workers 4 --storage-path /shared/runs
#
# Arguments after the script's name are passed to jobs/train.py. The output goes to mnist-ray-JOB.log. `scancel` and the
# time limit kill the job; resume it from its last checkpoint with --resume --run-name NAME.
#SBATCH --job-name mnist-ray
#SBATCH --output %x-%j.log
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --time 01:00:00
set -euo pipefail
source .venv/bin/activate

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
cpus=${SLURM_CPUS_PER_TASK:?is not set: give sbatch --cpus-per-task}
# Ray's own answer, since the host's name may stand for the loopback.
address=$(srun --nodes 1 --ntasks 1 --nodelist "${hosts[0]}" python -c 'import ray; print(ray.util.get_node_ip_address())')
# If a token exists, a head asks for it, but other nodes send it only in this mode.
[ ! -e ~/.ray/auth_token ] || export RAY_AUTH_MODE=token

# Starts Ray everywhere, waits for all nodes, runs the job on the first and stops Ray again.
srun --cpus-per-task "$cpus" ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$cpus" -- python jobs/train.py "$@"
