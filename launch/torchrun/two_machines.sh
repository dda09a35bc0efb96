#!/usr/bin/env bash
# Post-trains a model across two machines, each holding one half of it. Run the same command on both:
#
#   HEAD_HOST=node-a bash launch/torchrun/two_machines.sh --model_name_or_path MODEL --train_file FILE --output_dir DIR
#
# Environment:
#   HEAD_HOST  name or address of one of the two machines, as the other one reaches it. Required, the same on both.
#   PORT       free TCP port of that machine, where the two meet (default 29500); the same on both
#   RUN_ID     name of the run (default lopt-pp); the same on both. Tells apart runs that meet at the same port.
#   LOCAL_ADDR address of this machine as the other one reaches it; differs between the two. By default its host name,
#              which the other machine must then be able to resolve.
#   IFACE      network interface that the stream of hidden states is bound to, such as eth1; may differ between the two.
#              By default the backend picks one.
#
# The traffic is neither encrypted nor authenticated, and carries the hidden states of the training data: use a private
# network. Besides PORT the machines connect to each other at ports that the system picks.
#
# Both machines need the model and the training rows (the run compares them before it starts). DIR is to be on a file
# system that both share. Without one, give --save_steps 0 (no checkpoints): each machine then keeps its own half of the
# weights in its DIR, and the run says at its end which file to copy where.
set -euo pipefail

usage() {
    echo "$*" >&2
    echo "usage, on both machines: HEAD_HOST=HOST [PORT=29500] [IFACE=NAME] bash $0 FLAGS_OF_LOPT_PP_TRAIN" >&2
    exit 2
}

[[ -n "${HEAD_HOST:-}" ]] || usage "HEAD_HOST is not set: name the machine where the two meet"
[[ $# -gt 0 ]] || usage "no flags given: at least --model_name_or_path, --train_file and --output_dir"
port="${PORT:-29500}"
[[ "$port" =~ ^[0-9]+$ ]] || usage "PORT is '$port': give a number"

if [[ -n "${IFACE:-}" ]]; then
    export NCCL_SOCKET_IFNAME="$IFACE" GLOO_SOCKET_IFNAME="$IFACE"
fi

exec torchrun --nnodes 2 --nproc-per-node 1 \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD_HOST:$port" --rdzv-id "${RUN_ID:-lopt-pp}" \
    ${LOCAL_ADDR:+--local-addr "$LOCAL_ADDR"} \
    -m lopt_pp.train \
    "$@"
