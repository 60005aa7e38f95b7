#!/bin/bash
# Once, on the login node: bash baseline/prepare.sh [options of train.py, as --model or --max-length]
# Makes the virtual environment, fetches model, data and the metric, and builds the features: nodes need no internet then.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
source "$root/baseline/env.sh"
unset HF_HUB_OFFLINE HF_EVALUATE_OFFLINE  # an earlier preparation has set these
say() { echo "prepare.sh: $*"; }

say "the environment is ready: $VIRTUAL_ENV, $(python -c 'import platform; from importlib.metadata import version as v; print("Python", platform.python_version(), "torch", v("torch"), "transformers", v("transformers"))')"

# torch.compile builds small C modules on the node. Nodes usually have what the login node has.
include=$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
if echo '#include <Python.h>' | "${CC:-gcc}" -I"$include" -x c -fsyntax-only - 2>/dev/null; then
    say "compiling can work: ${CC:-gcc} finds Python.h"
else
    say "compiling will not work: ${CC:-gcc} is missing or finds no Python.h in $include; load a compiler, install python3-dev, or train with --no-compile"
fi

python "$root/baseline/train.py" --prepare "$@"

hub=yes
for option in "$@"; do case $option in --sample | --train-file*) hub=no ;; esac; done
if [ $hub = yes ]; then
    if python -c 'import evaluate; evaluate.load("squad")' >/dev/null 2>&1; then
        say "evaluate's squad metric is ready"
    else
        say "evaluate's squad metric cannot be fetched; train.py's own scorer gives the same figures"
    fi
    mkdir -p "$SQUAD_CACHE" && touch "$SQUAD_CACHE/prepared"  # env.sh tells the libraries to stay offline from now on
fi
next="bash baseline/run.sbatch"
if command -v sbatch >/dev/null; then next="sbatch baseline/run.sbatch"; fi
say "next: $next$(printf ' %q' "$@" | sed "s/^ ''$//")"
