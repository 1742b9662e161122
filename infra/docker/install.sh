#!/usr/bin/env bash
# What the images install, in the two steps that make two layers:
#   install.sh packages VENV    every dependency at its pinned version, from pyproject.toml and constraints.txt of this folder
#   install.sh code VENV        the command `darkroom`, whose code stays in this folder
set -euo pipefail

venv=$2

# uv installs the set several times faster than pip; where only pip's own settings know the package index, pip does it.
add() {
    "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" "$@" \
        || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check "$@"
}

case $1 in
    packages)
        python3.11 -m venv "$venv"
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --constraint constraints.txt uv hatchling editables
        requirements=$(mktemp)
        trap 'rm -f "$requirements"' EXIT
        "$venv/bin/python" - > "$requirements" <<'PYTHON'
import sys
import tomllib

with open("pyproject.toml", "rb") as file:
    project = tomllib.load(file)["project"]
extras = project["optional-dependencies"]
sys.stdout.write("\n".join([*project["dependencies"], *extras["s3"], *extras["aws"]]) + "\n")
PYTHON
        add --constraint constraints.txt --requirement "$requirements"
        ;;
    code)
        add --no-deps --no-build-isolation --editable .
        "$venv/bin/python" -m compileall -q data training stages flows
        ;;
    *)
        echo "install.sh: $1 is neither packages nor code" >&2
        exit 2
        ;;
esac
