# Source this with bash: it makes the virtual environment (once), enters it, and sets where things are kept.
#
#   source baseline/env.sh && pytest
#
# Each of these may be set beforehand; README.md has the table of them:
#   VENV           one that exists is used as it is and never changed; else it is made here ($STORE/bert-squad/venv or .venv)
#   PYTHON         the Python to make it with, 3.10 or newer
#   MODULES        modules to load first ("cesga/2020 python/3.10.8" where the cluster has them; "" for none)
#   TORCH_INDEX    where torch's wheels come from, as https://download.pytorch.org/whl/cu126; TORCH_VERSION which
#   HF_HOME        models and data from the hub;  SQUAD_CACHE  features;  TORCHINDUCTOR_CACHE_DIR  compiled code
# shellcheck shell=bash

if [ -z "${BASH_VERSION:-}" ] || [ "${BASH_SOURCE[0]}" = "$0" ]; then
    echo "env.sh: source it with bash: source baseline/env.sh" >&2
    # shellcheck disable=SC2317  # exit is for where return cannot be: started, not sourced
    return 2 2>/dev/null || exit 2
fi

_env_say() { echo "env.sh: $*" >&2; }

# Inside the functions the caller's `set -e` is off (they are called with ||), so every step checks itself.

_env_modules() {
    local loaded=${LOADEDMODULES:-} flags=$- code=0
    type module >/dev/null 2>&1 || return 0
    set +u  # modules' own code is seldom fit for it
    if [ -n "${MODULES+set}" ]; then
        # shellcheck disable=SC2086  # a list of words
        [ -z "$MODULES" ] || module load $MODULES || code=1
        [ "$code" = 0 ] || _env_say "MODULES=\"$MODULES\" cannot be loaded: module avail lists what there is"
    elif [[ $loaded != *python/* && $loaded != *conda* ]]; then
        # The course's Python. Elsewhere it is not known, and that is no fault.
        module load cesga/2020 python/3.10.8 >/dev/null 2>&1 || true
    fi
    case $flags in *u*) set -u ;; esac
    return $code
}

_env_python() {  # prints the interpreter to make the venv with
    local try found
    local tries=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "${PYTHON:-}" ] || tries=("$PYTHON")
    for try in "${tries[@]}"; do
        found=$("$try" -c 'import sys, venv, ensurepip; sys.version_info >= (3, 10) and print(sys.executable)' 2>/dev/null)
        if [ -n "$found" ]; then echo "$found"; return; fi
    done
    found=$("${tries[0]}" -c 'import sys; print("is", sys.version.split()[0])' 2>/dev/null) || found="is not there"
    _env_say "needs Python 3.10 or newer with venv and pip (${tries[0]} $found): load a module, install python3-venv, or set PYTHON=/path/to/python3"
    return 1
}

_env_torch_index() {  # prints where this machine's torch comes from; nothing for pip's own default (the newest CUDA)
    local python=$1 cuda index
    cuda=$(nvidia-smi 2>/dev/null | sed -n 's/.*CUDA[A-Za-z ]*Version: *\([0-9]*\)\..*/\1/p')
    if [ -n "$cuda" ]; then
        [ "$cuda" -lt 13 ] || return 0
        index=https://download.pytorch.org/whl/cu126  # runs on every driver for CUDA 12; newer wheels want CUDA 13
    elif command -v sbatch >/dev/null; then
        index=https://download.pytorch.org/whl/cu126  # a login node: the nodes' drivers are seldom the newest
    else
        index=https://download.pytorch.org/whl/cpu  # no GPU: a tenth of the download
    fi
    if timeout 5 "$python" -c 'import sys, urllib.request as u; u.urlopen(sys.argv[1], timeout=5)' "$index/torch/" 2>/dev/null; then
        echo "$index"
    else
        _env_say "$index cannot be reached: torch comes from pip's default (TORCH_INDEX chooses another)"
    fi
}

_env_pip() {  # shows how far it is, keeps all the rest in a log
    PIP_DISABLE_PIP_VERSION_CHECK=1 "$VENV/bin/python" -m pip install --no-cache-dir --progress-bar off "$@" 2>&1 |
        tee -a "$VENV/pip.log" | awk '
            /^(Collecting|Processing) / { if (++n % 15 == 1) { print "  getting " $2 " and what it needs ..."; fflush() } }
            /^Installing collected/ { print "  installing " NF - 3 " packages ..."; fflush() }
            /^ERROR/ { print "  " $0; fflush() }' >&2
    return "${PIPESTATUS[0]}"
}

_env_torch() {  # torch first: it may come from an index of its own, which is no place for the rest
    local index=$_env_index torch
    mapfile -t torch < <(grep '^torch==' "$_env_root/requirements.txt")
    [ -z "${TORCH_VERSION:-}" ] || torch=("torch==$TORCH_VERSION")
    [ "${#torch[@]}" -gt 0 ] || return 0
    if [ -z "$index" ]; then
        index=$(_env_torch_index "$1")
        [ -z "$index" ] || ! _env_pip --index-url "$index" "${torch[@]}" || return 0
        index=''
    fi
    _env_pip ${index:+--index-url "$index"} "${torch[@]}"
}

_env_lock() {  # waits until $VENV.lock is ours. A folder, since flock is not to be had on every shared file system
    local lock=$VENV.lock me=$BASHPID here told='' still=0 old='' beat host pid
    here=$(uname -n)  # not $HOSTNAME, which a job may bring from the login node
    until mkdir "$lock" 2>/dev/null; do
        [ -d "$lock" ] || { _env_say "cannot make $VENV: set VENV to a folder that you can write"; return 1; }
        [ -n "$told" ] || _env_say "another start is making $VENV: waiting for it"
        told=1
        sleep 0.5
        beat=$(cat "$lock/beat" 2>/dev/null)
        if [ "$beat" = "$old" ]; then still=$((still + 1)); else still=0 old=$beat; fi
        read -r host pid _ <<<"$beat"
        # Its owner is dead: no longer on this machine, or on another one and without a sign for two minutes.
        if [ "$still" -ge 240 ] || { [ "$host" = "$here" ] && ! kill -0 "$pid" 2>/dev/null; }; then
            mv -T "$lock" "$lock.$me" 2>/dev/null || continue
            if [ "$(cat "$lock.$me/beat" 2>/dev/null)" = "$beat" ]; then rm -rf "$lock.$me"; else mv -T "$lock.$me" "$lock"; fi
        fi
    done
    echo "$here $me 0" >"$lock/beat"
    while sleep 10 && kill -0 "$me"; do echo "$here $me $SECONDS" >"$lock/beat" || break; done >/dev/null 2>&1 &
    _env_beat=$!
    trap 'kill "$_env_beat" 2>/dev/null; rm -rf "$VENV.lock"' EXIT
}

_env_current() {  # whether the venv is ours and has what requirements.txt and TORCH_* ask for
    local sum='' index='' version=''
    [ -x "$VENV/bin/python" ] && { read -r sum; read -r index; read -r version; } 2>/dev/null <"$VENV/$_env_stamp"
    _env_index=${TORCH_INDEX:-$index}
    [ "$sum" = "$_env_sum" ] && [ "$_env_index" = "$index" ] && [ "${TORCH_VERSION:-$version}" = "$version" ]
}

_env_make() (  # a subshell, for its trap
    mkdir -p "$(dirname "$VENV")" 2>/dev/null
    _env_lock || exit 1
    if _env_current; then exit 0; fi  # another start has made it while we waited
    python=$(_env_python) || exit 1
    state='' old=''
    { read -r state; read -r old; } 2>/dev/null <"$VENV/$_env_stamp"
    # A start that was killed leaves a venv that the next one makes anew: the stamp says that it is ours and not whole.
    { mkdir -p "$VENV" && printf 'under way\n%s\n' "$old" >"$VENV/$_env_stamp" && : >"$VENV/pip.log"; } || exit 1
    _env_say "making $VENV with $("$python" -V); all of it is in $VENV/pip.log"
    if [ "${state:-under way}" = "under way" ] || ! "$VENV/bin/python" -c '' 2>/dev/null; then
        rm -rf "${VENV:?}"/{bin,lib,lib64,include,pyvenv.cfg}
        "$python" -m venv "$VENV" || { _env_say "python -m venv failed: set PYTHON to another Python"; exit 1; }
    fi
    if [ -n "${TORCH_INDEX:-}" ] && [ "$TORCH_INDEX" != "$old" ]; then  # the same version from elsewhere: pip would keep it
        "$VENV/bin/python" -m pip uninstall -q -y torch >/dev/null 2>&1
    fi
    grep -v '^torch==' "$_env_root/requirements.txt" >"$VENV/requirements.txt"
    if ! _env_torch "$python" || ! _env_pip -r "$VENV/requirements.txt"; then
        _env_say "pip failed, see $VENV/pip.log: $(grep '^ERROR' "$VENV/pip.log" | tail -n 1 | cut -c 1-200)." \
            "Where nodes have no internet, run baseline/prepare.sh on the login node"
        exit 1
    fi
    printf '%s\n' "$_env_sum" "$_env_index" "${TORCH_VERSION:-}" >"$VENV/$_env_stamp"
)

_env_check() {  # a venv of the user's own: has it what train.py needs? Reads the packages' names only, so it is quick
    "$VENV/bin/python" -s - "$VENV" <<'END'
import sys
from importlib import metadata

needed = {"torch": (2, 11), "transformers": (5, 17), "datasets": (5, 0), "tensorboard": (2, 19), "matplotlib": (3, 8)}
wrong = [] if sys.version_info >= (3, 10) else [f"Python 3.10 (has {sys.version.split()[0]})"]
for name, least in needed.items():
    text = ".".join(map(str, least))
    try:
        found = metadata.version(name)
    except metadata.PackageNotFoundError:
        wrong.append(f"{name}>={text}")
    else:
        if tuple(int("".join(filter(str.isdigit, part)) or 0) for part in found.split("+")[0].split(".")[:2]) < least:
            wrong.append(f"{name}>={text} (has {found})")
if wrong:
    sys.exit(f"env.sh: VENV={sys.argv[1]} is used as it is and lacks {', '.join(wrong)}: install that in it, or unset VENV to have one made")
END
}

_env_gpus() {  # sets GPU_COUNT; on a node with GPUs that torch cannot use it stops. Costs an import of torch there, nothing elsewhere
    local seen
    export GPU_COUNT=0
    [[ ${CUDA_VISIBLE_DEVICES-0} =~ ^[^-] ]] || return 0  # "" or -1: the user wants the CPU
    nvidia-smi -L 2>/dev/null | grep '^GPU' >/dev/null || return 0
    seen=$("$VENV/bin/python" -W ignore -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0, torch.__version__)')
    GPU_COUNT=${seen%% *}
    [ "${GPU_COUNT:-0}" -gt 0 ] && return
    local driver mend="VENV= TORCH_INDEX=https://download.pytorch.org/whl/cu126 bash baseline/prepare.sh"
    [ "$_env_ours" = yes ] && mend=${mend#VENV= }
    driver=$(nvidia-smi | sed -n 's/.*Driver Version: *\([0-9.]*\).*CUDA[A-Za-z ]*Version: *\([0-9.]*\).*/driver \1, for CUDA up to \2/p')
    _env_say "$(uname -n) has GPUs, but torch ${seen#* } sees none ($driver). Where there is internet: $mend (or CUDA_VISIBLE_DEVICES= to go on without a GPU)"
    return 1
}

_env_main() {
    local _env_root _env_sum _env_index='' _env_ours=yes _env_stamp=.made-by-env.sh
    _env_root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd) || return 1
    if [ -n "${STORE:-}" ]; then  # FinisTerrae III: $HOME is too small for venv, models and caches
        : "${VENV:=$STORE/bert-squad/venv}" "${HF_HOME:=$STORE/bert-squad/huggingface}" "${SQUAD_CACHE:=$STORE/bert-squad/cache}"
        export HF_HOME
    fi
    : "${VENV:=$_env_root/.venv}" "${SQUAD_CACHE:=$_env_root/.cache}"
    VENV=$(realpath -ms "$VENV") && SQUAD_CACHE=$(realpath -ms "$SQUAD_CACHE") || return 1
    export SQUAD_CACHE TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$SQUAD_CACHE/inductor}
    export PYTHONNOUSERSITE=1  # what lies in ~/.local would shadow the venv
    if [ -e "$SQUAD_CACHE/prepared" ]; then  # prepare.sh has run: without these a node with no internet waits for the hub
        export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1} HF_EVALUATE_OFFLINE=${HF_EVALUATE_OFFLINE:-1}
    fi

    _env_modules || return 1
    unset PYTHONPATH  # a module's packages would shadow the venv, and pip would take them for installed
    _env_sum=$(cksum <"$_env_root/requirements.txt") || return 1
    if [ -x "$VENV/bin/python" ] && [ ! -e "$VENV/$_env_stamp" ]; then
        _env_ours=no
        _env_check || return 1
    elif [ ! -e "$VENV/$_env_stamp" ] && [ -n "$(ls -A "$VENV" 2>/dev/null)" ]; then
        _env_say "VENV=$VENV holds something else than a virtual environment: set it to another folder"
        return 1
    else
        _env_current || _env_make || return 1
    fi
    export VIRTUAL_ENV=$VENV
    [[ $PATH == "$VENV/bin:"* ]] || export PATH="$VENV/bin:$PATH"
    unset PYTHONHOME

    # pytest needs its settings from here, since the root has no file for them.
    local options  # quoted, as any character may stand in the folder's name
    printf -v options -- '-c %q --rootdir=%q' "$_env_root/baseline/tests/pytest.ini" "$_env_root"
    [[ ${PYTEST_ADDOPTS:-} == *"$options"* ]] || export PYTEST_ADDOPTS="$options${PYTEST_ADDOPTS:+ $PYTEST_ADDOPTS}"
    _env_gpus
}

_env_code=0
_env_main || _env_code=1
mapfile -t _env_names < <(compgen -A function _env_)
unset -f "${_env_names[@]}"
unset _env_names
[ "$_env_code" = 0 ]
