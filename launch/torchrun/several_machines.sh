#!/usr/bin/env bash
# Post-trains a model across several machines: by default two, each holding one half of it. Run the same command on all:
#
#   HEAD_HOST=node-a bash launch/torchrun/several_machines.sh --model_name_or_path MODEL --train_file FILE \
#       --output_dir DIR
#
# Environment:
#   HEAD_HOST  address of one of the machines, as the others reach it, or a name for it. Required, the same on all. That
#              machine listens at this address only.
#   NNODES     number of machines (default 2); the same on all
#   NPROC_PER_NODE  processes on each (default 1); the same on all. Ranks go from machine to machine, and the replicas of
#              a stage have ranks in a row, so each boundary crosses the network once.
#   PORT       free TCP port of that machine, where they meet (default 29500); the same on all
#   MAX_RESTARTS  times that the run starts again, from its newest checkpoint, when a process has failed (default 3)
#   RUN_ID     name of the run (default lopt-pp); the same on all. Tells apart runs that meet at the same port.
#   IFACE      network interface that the stream of hidden states is bound to, such as eth1; may differ between them.
#              By default the backend picks one.
#
# The traffic is neither encrypted nor authenticated, and carries the hidden states of the training data: use a private
# network (docs/network.md). Besides PORT the machines connect to each other at ports that the system picks.
#
# All machines need the model and the training rows (the run compares them before it starts). DIR is to be on a file
# system that all share. Without one, give --save_steps 0 (no checkpoints): each machine then keeps its own part of the
# weights in its DIR, and the run says at its end which file to copy where.
set -euo pipefail

usage() {
    echo "$*" >&2
    echo "usage, on all machines: HEAD_HOST=HOST [NNODES=2] [NPROC_PER_NODE=1] [PORT=29500] [IFACE=NAME] bash $0 FLAGS_OF_LOPT_PP_TRAIN" >&2
    exit 2
}

[[ -n "${HEAD_HOST:-}" ]] || usage "HEAD_HOST is not set: name the machine where they meet"
[[ $# -gt 0 ]] || usage "no flags given: at least --model_name_or_path, --train_file and --output_dir"
port="${PORT:-29500}"
[[ "$port" =~ ^[0-9]+$ ]] || usage "PORT is '$port': give a number"

if [[ -n "${IFACE:-}" ]]; then
    export NCCL_SOCKET_IFNAME="$IFACE" GLOO_SOCKET_IFNAME="$IFACE"
fi

# Time for a step to end and to be saved when the run is stopped; torchrun would kill it after 30 seconds.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT="${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}"

exec torchrun --nnodes "${NNODES:-2}" --nproc-per-node "${NPROC_PER_NODE:-1}" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend lopt-pp --rdzv-endpoint "$HEAD_HOST:$port" --rdzv-id "${RUN_ID:-lopt-pp}" \
    -m lopt_pp.train \
    "$@"
