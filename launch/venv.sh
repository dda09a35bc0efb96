#!/usr/bin/env bash
# Makes a virtual environment with LoPT-PP and one of its extras, from this checkout:
#
#   bash launch/venv.sh DIRECTORY EXTRA
#
# One that was made here before, of the same Python and for the same requirements, is left as it is.
#
# Environment:
#   PYTHON      Python that the virtual environment is made of, 3.11 or newer (default python3)
#   TORCH_SPEC  what to install as torch, as pip takes it (default: the version in constraints.txt). The default build
#               for Linux brings along the CUDA libraries, several gigabytes. To spare them where there is no GPU, take
#               a CPU build: TORCH_SPEC=torch==2.13.0+cpu PIP_EXTRA_INDEX_URL=<PyTorch's own index of CPU builds>
set -euo pipefail

fail() {
    echo "venv: $*" >&2
    exit 1
}

[[ $# == 2 ]] || fail "usage: bash $0 DIRECTORY EXTRA"
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "$1"
venv="$(cd "$1" && pwd)" extra="$2"
python="${PYTHON:-python3}"
torch_spec="${TORCH_SPEC:-$(grep '^torch==' "$root/constraints.txt")}"

command -v "$python" >/dev/null || fail "no '$python' here; name a Python of 3.11 or newer by PYTHON"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$python is $("$python" --version 2>&1); name a Python of 3.11 or newer by PYTHON"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv package (on Debian: apt-get install python3-venv)"

wanted="$venv $extra
$("$python" -c 'import sys; print(sys.base_prefix, sys.version)')
$torch_spec
$(cat "$root/pyproject.toml" "$root/constraints.txt")"
if [[ "$wanted" == "$(cat "$venv/made-for" 2>/dev/null)" ]]; then
    exit
fi
echo "Installing into $venv (a few minutes)"
if [[ -z "${TORCH_SPEC:-}" && "$(uname)" == Linux ]] && ! command -v nvidia-smi >/dev/null; then
    echo "No NVIDIA GPU found: see TORCH_SPEC at the top of launch/venv.sh if torch should come without CUDA."
fi
"$python" -m venv --clear "$venv"
pip=("$venv/bin/python" -m pip --quiet --disable-pip-version-check)
"${pip[@]}" install "$torch_spec"
# Without the line for torch, which is there by now and may be another version on purpose.
grep -v '^torch==' "$root/constraints.txt" >"$venv/constraints.txt"
"${pip[@]}" install -c "$venv/constraints.txt" -e "${root}[$extra]"
printf '%s\n' "$wanted" >"$venv/made-for"
