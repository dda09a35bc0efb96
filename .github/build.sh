#!/usr/bin/env bash
# Builds the source archive and, from it, the wheel; checks both; and installs the wheel where nothing else is installed:
#
#   bash .github/build.sh DIRECTORY
#
# Needs: python -m pip install build twine
set -euo pipefail

[[ $# == 1 ]] || {
    echo "usage: bash $0 DIRECTORY" >&2
    exit 1
}
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
mkdir -p "$1"
out="$(cd "$1" && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT

# A copy of what git knows, for a README whose links work on the page of a package index, and without leftovers of
# earlier builds.
mkdir "$work/source"
(cd "$root" && git ls-files -z --cached --others --exclude-standard | xargs -0 cp --parents -t "$work/source")
python "$root/.github/index_readme.py" "$root/README.md" >"$work/source/README.md"
python -m build --outdir "$out" "$work/source"
python -m twine check --strict "$out"/*
python "$root/.github/check_release.py" --draft "$out"

# Outside of the checkout, so that Python finds the installed package and not the folder. Without its dependencies: what
# is asked for here needs none of them.
cd "$work"
python -m venv venv
venv/bin/python -m pip install --quiet --no-deps "$out"/*.whl
shown="$(venv/bin/lopt-pp --version)"
version="$(venv/bin/python -c 'import lopt_pp; print(lopt_pp.__version__)')"
[[ "$shown" == "$version" ]] || {
    echo "lopt-pp --version says $shown, lopt_pp.__version__ $version" >&2
    exit 1
}
venv/bin/lopt-pp --help >/dev/null
venv/bin/lopt-pp recipe two_gpus | cmp - "$root/launch/recipes/two_gpus.yaml"
echo "$version builds and installs"
