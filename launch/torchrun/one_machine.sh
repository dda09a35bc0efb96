#!/usr/bin/env bash
# Post-trains a model across the GPUs (or CPU cores) of one machine, one process for each half of the model.
#
#   bash launch/torchrun/one_machine.sh MODEL TRAIN_FILE OUTPUT_DIR [more flags of lopt_pp.train]
#
# Environment:
#   MAX_RESTARTS    times that the run starts again, from its newest checkpoint, when a process has failed (default 3)
#   NPROC_PER_NODE  number of processes (default 2). Each holds one stage; give --num_stages as well for more than two.
#
# Ctrl-C (or SIGTERM) ends the step, saves a checkpoint and leaves; with --resume_from_checkpoint latest it goes on.
#
# Any further environment variable reaches the processes: CUDA_VISIBLE_DEVICES picks the GPUs, OMP_NUM_THREADS the CPU
# threads of each process (torchrun sets 1 where it is unset).
set -euo pipefail

if [[ $# -lt 3 || "$1" == -* || "$2" == -* || "$3" == -* ]]; then
    echo "usage: bash $0 MODEL TRAIN_FILE OUTPUT_DIR [more flags; see: python -m lopt_pp.train --help]" >&2
    exit 2
fi
model="$1" train_file="$2" output_dir="$3"
shift 3

# --rdzv-backend lopt-pp: the processes meet at a free port of the loopback interface, so runs side by side do not disturb
# each other, and no other machine can reach them; see docs/network.md.
# Time for a step to end and to be saved when the run is stopped; torchrun would kill it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

exec torchrun --rdzv-backend lopt-pp --max-restarts "${MAX_RESTARTS:-3}" --nproc-per-node "${NPROC_PER_NODE:-2}" \
    -m lopt_pp.train \
    --model_name_or_path "$model" \
    --train_file "$train_file" \
    --output_dir "$output_dir" \
    "$@"
