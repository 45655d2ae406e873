#!/bin/bash
# Train on Slurm, with a Ray node on each machine. Run it in a checkout with a .venv, in a folder that all machines see:
#
#     sbatch --nodes 2 --cpus-per-task 8 deploy/slurm.sh --num-workers 4 --storage-path /shared/runs
#     sbatch --nodes 2 --cpus-per-task 8 --gpus-per-node 4 deploy/slurm.sh --storage-path /shared/runs
#
# Arguments after the script's name are passed to jobs/train.py. The output goes to mnist-ray-JOB.log. Before the time
# limit, the script lets the job save a checkpoint, and queues itself again; so does Slurm if a node fails. The run is
# named after the Slurm job, so it continues. After `scancel`, continue it with --run-name mnist-ray-JOB.
#SBATCH --job-name mnist-ray
#SBATCH --output %x-%j.log
#SBATCH --open-mode append
#SBATCH --ntasks-per-node 1
#SBATCH --exclusive
#SBATCH --time 01:00:00
#SBATCH --requeue
# B: only this script gets the signal, which would end Ray's processes. The job needs the time for a checkpoint (if it
# cannot save one, it gives up after a minute) and its report. Slurm may send the signal up to a minute earlier.
#SBATCH --signal B:USR1@120
set -euo pipefail
# shellcheck source=/dev/null
source .venv/bin/activate

mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
cpus=${SLURM_CPUS_PER_TASK:?is not set: give sbatch --cpus-per-task}
gpus=${SLURM_GPUS_PER_NODE:-0}  # perhaps with a type: a100:4
# Ray's own answer, since the host's name may stand for the loopback.
address=$(srun --nodes 1 --ntasks 1 --nodelist "${hosts[0]}" python -c 'import ray; print(ray.util.get_node_ip_address())')
# If a token exists, a head asks for it, but other nodes send it only in this mode.
[ ! -e ~/.ray/auth_token ] || export RAY_AUTH_MODE=token

# The job runs on the first node, as this script does. SIGTERM goes only to its process: Ray must live until the
# checkpoint is saved. If that takes too long, the run continues from the checkpoint before.
pid_file=$(mktemp)
trap 'rm "$pid_file"' EXIT
requeue() {
    if [ -s "$pid_file" ] && kill -TERM "$(<"$pid_file")"; then
        timeout 100 tail --pid "$(<"$pid_file")" --follow /dev/null || echo "the job has not ended in time"
    fi
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
}
trap requeue USR1

# Starts Ray everywhere, waits for all nodes, runs the job on the first and stops Ray again. It runs in the background,
# since bash handles a signal only after a command in the foreground.
# shellcheck disable=SC2016  # the inner bash expands $0, the PID's file, and $@, the job
srun --cpus-per-task "$cpus" ray symmetric-run --address "$address:6379" --min-nodes "$SLURM_JOB_NUM_NODES" \
    --num-cpus "$cpus" --num-gpus "${gpus##*:}" -- bash -c 'echo $$ > "$0"; exec "$@"' "$pid_file" \
    python jobs/train.py --resume auto --run-name "mnist-ray-$SLURM_JOB_ID" "$@" &
wait $!
