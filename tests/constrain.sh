#!/bin/sh
# Writes tests/constraints.txt: the newest releases, for every Python that setup.cfg admits.
# Run it, run the tests ("python -m tox -p 2"), and commit the file if they pass.
# Needs uv.  What torch pins exactly for itself (CUDA) is left out, and so are the extras that no
# test installs.
set -eu
cd "$(dirname "$0")/.."
found="$(uv pip compile --quiet --universal --python-version 3.9 --no-annotate --no-header \
    --extra age --extra browser --extra dev --extra hub --extra local --extra notebook --extra otel \
    --extra plots --extra testing --extra tests --extra zstd setup.cfg)"
{
    echo "# The versions that the tests run with (tox.ini).  Written by tests/constrain.sh."
    echo "$found" | grep -vE '^(cuda|nvidia|triton)'
} >tests/constraints.txt
