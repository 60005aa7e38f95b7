# Source this with bash: it makes the virtual environment (once), enters it, and sets where things
# are kept. README.md has the table of what may be set beforehand: STORE, VENV, PYTHON, MODULES,
# TORCH_INDEX, TORCH_VERSION, HF_HOME, SQUAD_CACHE.
#
#   source baseline/env.sh && pytest
#
# shellcheck shell=bash

if [ -z "${BASH_VERSION:-}" ] || [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "env.sh: source it with bash: source baseline/env.sh" >&2
    # shellcheck disable=SC2317  # exit is for where return cannot be: started, not sourced
    return 2 2>/dev/null || exit 2
fi

_env_say() { echo "env.sh: $*" >&2; }

_env_main() {
    local - root stamp torch_index torch_version wanted pytest_options
    set +uC  # until the end of this function: modules' own code is seldom fit for the caller's -u
    root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1

    if [ -n "$STORE" ]; then  # FinisTerrae III: $HOME is too small for venv, models and caches
        VENV=${VENV:-$STORE/bert-squad/venv}
        SQUAD_CACHE=${SQUAD_CACHE:-$STORE/bert-squad/cache}
        export HF_HOME=${HF_HOME:-$STORE/bert-squad/huggingface}
    fi
    VENV=$(realpath -ms "${VENV:-$root/.venv}") || return 1
    SQUAD_CACHE=$(realpath -ms "${SQUAD_CACHE:-$root/.cache}") || return 1
    export SQUAD_CACHE
    if [ -e "$SQUAD_CACHE/prepared" ]; then
        # prepare.sh has run. Without these, nodes with no internet would wait for the hub.
        export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_EVALUATE_OFFLINE=${HF_EVALUATE_OFFLINE:-1}
    fi

    if type module >/dev/null 2>&1; then
        if [ -n "$MODULES" ]; then
            # shellcheck disable=SC2086  # a list of words
            if ! module load $MODULES >&2; then
                _env_say "MODULES=\"$MODULES\" cannot be loaded: module avail lists what there is"
                return 1
            fi
        elif [ -z "${MODULES+set}" ] && [[ ! $LOADEDMODULES =~ python/|conda ]]; then
            module load cesga/2020 python/3.10.8 >/dev/null 2>&1  # not every cluster has them
        fi
    fi
    # Packages of a module, or of ~/.local, would shadow the venv's.
    unset PYTHONPATH PYTHONHOME
    export PYTHONNOUSERSITE=1

    stamp=$VENV/.made-by-env.sh
    if [ -z "$(ls -A "$VENV" 2>/dev/null)" ] || [ -e "$stamp" ]; then
        _env_is_current || { mkdir -p "$VENV" && _env_make; } || return 1
    elif [ -x "$VENV/bin/python" ]; then
        _env_check || return 1
    else
        _env_say "VENV=$VENV holds something else than a virtual environment: set another folder"
        return 1
    fi
    export VIRTUAL_ENV=$VENV
    if [[ $PATH != "$VENV/bin:"* ]]; then export PATH=$VENV/bin:$PATH; fi

    # pytest's settings, as the root has no file for them; %q since the path may have a space.
    printf -v pytest_options -- '-c %q --rootdir=%q' "$root/baseline/tests/pytest.ini" "$root"
    if [[ $PYTEST_ADDOPTS != *"$pytest_options"* ]]; then
        export PYTEST_ADDOPTS="$pytest_options${PYTEST_ADDOPTS:+ $PYTEST_ADDOPTS}"
    fi
    _env_gpus
}

# Whether the venv is what requirements.txt and TORCH_* ask for: its stamp, which is written last,
# holds what it was made from. What TORCH_* were then counts where they are not set now, as in jobs.
_env_is_current() {
    local recorded=()
    mapfile -t recorded 2>/dev/null <"$stamp"
    torch_index=${TORCH_INDEX:-${recorded[1]}}
    torch_version=${TORCH_VERSION:-${recorded[2]}}
    wanted=$(cksum <"$root/requirements.txt"; printf '%s\n' "$torch_index" "$torch_version")
    [ -x "$VENV/bin/python" ] && [ "$(cat "$stamp")" = "$wanted" ]
}

# Makes the venv, or updates it. Meanwhile it locks the stamp, and another start waits. The system
# ends a lock with its process, so a killed start leaves none.
_env_make() (
    exec 9>>"$stamp" || exit 1
    if ! flock -n 9; then
        _env_say "another start is making $VENV: waiting for it"
        flock 9 || _env_say "this file system has no locks: going on without"
    fi
    if _env_is_current; then exit 0; fi

    if [ -s "$stamp" ] && "$VENV/bin/python" -m pip --version >/dev/null 2>&1; then
        _env_say "updating $VENV: requirements.txt or TORCH_* have changed"
        printf '%s\n' unfinished "$torch_index" "$torch_version" >"$stamp"
        # pip would keep a torch of the same version from another index.
        if [ -n "$TORCH_INDEX" ]; then _env_pip uninstall --quiet --yes torch; fi
    else  # there is none, or one that a killed start has left
        python=${PYTHON:-python3}
        check='import sys, venv, ensurepip; assert sys.version_info >= (3, 10)'
        if ! "$python" -c "$check" 2>/dev/null; then
            _env_say "needs Python 3.10 or newer with venv, $python is: $("$python" -V 2>&1)." \
                "Load a module, install python3-venv, or set PYTHON=/path/to/python3"
            exit 1
        fi
        _env_say "making $VENV with $("$python" -V), once: this takes 2 to 15 minutes"
        rm -rf "${VENV:?}"/{bin,include,lib,lib64,pyvenv.cfg}
        "$python" -m venv "$VENV" || exit 1
    fi

    # torch first, as its index is no place for the rest.
    index=${torch_index:-$(_env_torch_index)}
    mapfile -t torch < <(grep '^torch==' "$root/requirements.txt")
    if [ -n "$torch_version" ]; then torch=("torch==$torch_version"); fi
    _env_say "torch comes from ${index:-the index that pip has by default}"
    if ! _env_pip install ${index:+--index-url "$index"} "${torch[@]}" ||
        ! _env_pip install -r <(grep -v '^torch==' "$root/requirements.txt"); then
        _env_say "pip failed, see above. Where nodes have no internet, it has to be made on the" \
            "login node: bash baseline/prepare.sh"
        exit 1
    fi
    echo "$wanted" >"$stamp"
)

_env_pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-cache-dir "$@" >&2; }

# Prints where the torch for this machine's driver is; nothing for pip's default, the newest CUDA.
_env_torch_index() {
    local cuda index=https://download.pytorch.org/whl
    cuda=$(nvidia-smi 2>/dev/null | grep -o 'CUDA[A-Za-z ]*Version: *[0-9]*' | grep -o '[0-9]*$')
    if [ "${cuda:-0}" -ge 13 ]; then
        return
    elif [ -n "$cuda" ] || command -v sbatch >/dev/null; then
        index+=/cu126  # fits all drivers of CUDA 12; a login node cannot see those of the others
    else
        index+=/cpu
    fi
    if command -v curl >/dev/null && ! curl -sfI -m 5 "$index/torch/" >/dev/null; then
        _env_say "$index cannot be reached (TORCH_INDEX can name another)"
    else
        echo "$index"
    fi
}

# Whether a venv of the user's own has what train.py needs; only reads it, and is quick.
_env_check() {
    local lacks
    lacks=$("$VENV/bin/python" - <<'END'
import re
from importlib.metadata import distributions

versions = {package.metadata["Name"]: package.version for package in distributions()}
needed = {"torch": (2, 11), "transformers": (5, 17), "datasets": (5, 0),
          "tensorboard": (2, 19), "matplotlib": (3, 8)}
for name, (major, minor) in needed.items():
    has = versions.get(name, "none")
    numbers = [int(number) for number in re.findall(r"\d+", has)]
    if numbers < [major, minor]:
        print(f"{name}>={major}.{minor} (has {has})")
END
    ) || return 1
    [ -n "$lacks" ] || return 0
    _env_say "VENV=$VENV is used as it is and lacks ${lacks//$'\n'/, }:" \
        "install that in it, or unset VENV to have one made"
    return 1
}

# Sets GPU_COUNT, and fails on a node with GPUs that torch cannot use. Quick where there are none.
_env_gpus() {
    local answer driver fix=TORCH_INDEX=https://download.pytorch.org/whl/cu126
    export GPU_COUNT=0
    [[ ${CUDA_VISIBLE_DEVICES-0} =~ ^[^-] ]] || return 0  # "" or -1: the user wants the CPU
    [[ $(nvidia-smi -L 2>/dev/null) == GPU* ]] || return 0
    if ! answer=$("$VENV/bin/python" -W ignore -c 'import torch
print(torch.__version__, torch.cuda.device_count() if torch.cuda.is_available() else 0)' 2>&1); then
        _env_say "torch cannot be imported: ${answer##*$'\n'}"
        return 1
    fi
    answer=${answer##*$'\n'}  # the last line: warnings come before it
    GPU_COUNT=${answer##* }
    if [ "$GPU_COUNT" != 0 ]; then return 0; fi
    driver=$(nvidia-smi | grep -o 'Version.*[0-9]' | tr -s '| ' ' ')
    if [ ! -e "$stamp" ]; then fix="VENV= $fix"; fi  # not for the user's own
    _env_say "$(uname -n) has GPUs, but torch ${answer% *} sees none (driver: $driver)." \
        "Where there is internet: $fix bash baseline/prepare.sh" \
        "(or CUDA_VISIBLE_DEVICES= to go on without a GPU)"
    return 1
}

_env_status=0
_env_main || _env_status=1
unset -f _env_say _env_main _env_is_current _env_make _env_pip _env_torch_index _env_check _env_gpus
[ "$_env_status" = 0 ]
