#!/bin/bash
# Once, on the login node: bash baseline/prepare.sh [options of train.py, such as --model]
# Makes the virtual environment, fetches the model, the data and the metric, and builds the
# features: then compute nodes need no internet.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
say() { echo "prepare.sh: $*"; }

source "$root/baseline/env.sh"
unset HF_HUB_OFFLINE HF_EVALUATE_OFFLINE  # set by env.sh after an earlier preparation
say "the environment is ready: $VIRTUAL_ENV"

# torch.compile builds small C modules on the node, which usually has what the login node has.
include=$(python -c 'import sysconfig; print(sysconfig.get_paths()["include"])')
if ! echo '#include <Python.h>' | "${CC:-gcc}" -I"$include" -x c -fsyntax-only - 2>/dev/null; then
    say "compiling will not work: ${CC:-gcc} is missing or finds no Python.h in $include:" \
        "load a compiler, install python3-dev, or train with --no-compile"
fi

python "$root/baseline/train.py" --prepare "$@"

case " $*" in
    *" --sample"* | *" --train-file"*) ;;  # nothing of the hub's
    *)
        if python -c 'import evaluate; evaluate.load("squad")' >/dev/null 2>&1; then
            say "evaluate's squad metric is ready"
        else
            say "evaluate's squad metric cannot be fetched: train.py's own scorer serves as well"
        fi
        mkdir -p "$SQUAD_CACHE"
        touch "$SQUAD_CACHE/prepared"  # from now on env.sh tells the libraries to stay offline
        ;;
esac
next="bash baseline/run.sbatch"
if command -v sbatch >/dev/null; then next="sbatch baseline/run.sbatch"; fi
say "next: $next$(printf ' %q' "$@" | sed "s/^ ''$//")"
