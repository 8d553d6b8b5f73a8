#!/usr/bin/env bash
# One training process for each GPU of this node. SIGTERM is passed on to them, and this ends with their status, which
# torchrun and accelerate launch would turn into 1: 75 asks for the same command again.
#   NODES=2 NODE=0 MASTER_ADDR=HOST bash tools/launch/node.sh FILES.yaml ... key=value ...
# FAILURES=100: a status that is neither 0 nor 75 is told that much larger, for who keeps the largest of several nodes'.
# 134, by which NCCL's watchdog ends a process that has waited too long for another one, counts as 75.
# NODE: this one's number from 0. GPUS: on each node (else what nvidia-smi lists). ACCELERATE_USE_FSDP=true
# FSDP_VERSION=2: shards (configs/accelerate/fsdp2.yaml). ACCELERATE_USE_DEEPSPEED=true ACCELERATE_DEEPSPEED_ZERO_STAGE=2:
# as zero2.yaml.
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
gpus=${GPUS:-$(nvidia-smi --list-gpus | wc -l)}
export WORLD_SIZE=$((NODES * gpus)) LOCAL_WORLD_SIZE=$gpus MASTER_ADDR MASTER_PORT=${MASTER_PORT:-29500}
pids=() told=0
trap 'told=$((told + 1)); kill -TERM "${pids[@]}" 2>/dev/null' TERM
for ((i = 0; i < gpus; i++)); do
  RANK=$((NODE * gpus + i)) LOCAL_RANK=$i python vidssl/train.py "$@" &
  pids+=($!)
done
if ((told)); then kill -TERM "${pids[@]}" 2>/dev/null; fi # those that started after the signal
ended=0
for pid in "${pids[@]}"; do
  seen=-1
  while ((seen != told)); do # the signal cuts a wait short
    seen=$told
    wait "$pid"
    status=$?
  done
  if ((status == 134)); then status=75; fi
  if ((status != 0 && (ended == 0 || ended == 75))); then ended=$status; fi # any failure counts more than 75
done
if ((ended != 0 && ended != 75)); then ended=$((ended + ${FAILURES:-0} < 256 ? ended + ${FAILURES:-0} : 255)); fi
exit "$ended"
