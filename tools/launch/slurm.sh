#!/usr/bin/env bash
# Training on nodes of a SLURM cluster, from the repository's folder, which like data and run.out all nodes must see:
#   sbatch tools/launch/slurm.sh configs/method/vjepa.yaml model.kind=vit_large configs/data/vjepa_16x4.yaml \
#     data.train=/data/k400/train run.out=/runs/vjepa_l run.steps=90000 run.batch=3072 run.lanes=16 efficiency.precision=bf16 \
#     efficiency.micro_batches=8 efficiency.workers=10
# Two minutes before the time is up, or the job is preempted, the processes get SIGTERM, save after their step and end
# with status 75; the job is then queued again, at most RESTARTS times (100), and the same command goes on. A step must be
# shorter than that. A run that makes no progress ends by itself (docs/training.md). The 192 clips of each GPU are taken in
# parts of the published 24, for GPUs of 80 GB.
#SBATCH --job-name=vidssl
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
#SBATCH --time=24:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -uo pipefail
cd "$SLURM_SUBMIT_DIR"
export NODES=$SLURM_NNODES GPUS=${SLURM_GPUS_ON_NODE:-8} SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1}
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((20000 + SLURM_JOB_ID % 10000)) # jobs that share a node must not meet
export MASTER_ADDR MASTER_PORT FAILURES=100 # srun ends with the largest status of all nodes, and no failure may hide
export ACCELERATE_USE_FSDP=true FSDP_VERSION=2 # shards; without this line the whole model on every GPU
srun bash -c 'NODE=$SLURM_NODEID exec bash tools/launch/node.sh "$@"' node "$@"
status=$?
if ((status == 75 && ${SLURM_RESTART_COUNT:-0} < ${RESTARTS:-100})); then scontrol requeue "$SLURM_JOB_ID"; fi
if ((status > FAILURES)); then status=$((status - FAILURES)); fi
exit "$status"
