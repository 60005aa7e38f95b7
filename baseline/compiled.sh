# Compiled code on the node's own disk, as many small files on a shared file system are slow, and
# go stale. $SQUAD_CACHE has one archive of it for each torch, Python and kind of node: unpacked at
# the start, written back at the end. It never costs a run its result. job.sh and node.sh source it.
# shellcheck shell=bash
compiled=''

# unpack_compiled FOLDER: Inductor and Triton compile into it, and find what earlier jobs have kept.
unpack_compiled() {
    if [ -n "${TORCHINDUCTOR_CACHE_DIR:-}" ]; then return; fi  # the user's own way
    compiled=$1
    made_with=$(
        python -c 'import platform, importlib.metadata as packages
print("torch", packages.version("torch"), "Python", platform.python_version())'
        nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null | sort -u
        grep -m 1 '^model name' /proc/cpuinfo
    ) || true
    archive=$SQUAD_CACHE/compiled-$(cksum <<<"$made_with" | cut -d ' ' -f 1).tar.gz
    if [ -e "$archive" ] && ! unpack_own; then
        say "$archive is damaged or was not made here: it is ignored"
        rm -rf "$compiled"
    fi
    # Written last, so that what is newer is new.
    if ! mkdir -p "$compiled" || ! echo "$made_with" >"$compiled/made-with"; then
        compiled=''
        return
    fi
    export TORCHINDUCTOR_CACHE_DIR=$compiled
    export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$compiled/triton}
}

# What is in the archive will be run, so it has to be this user's.
unpack_own() {
    [ -O "$archive" ] && mkdir -p "$compiled" &&
        timeout 60 tar -xzf "$archive" -C "$compiled" 2>/dev/null &&
        [ "$(cat "$compiled/made-with")" = "$made_with" ]
}

# pack_compiled: keeps what is new. The archive gets its name when it is whole.
pack_compiled() {
    local new temporary
    if [ -z "${compiled:-}" ]; then return; fi
    new=$(find "$compiled" -type f -newer "$compiled/made-with" -print -quit) || true
    if [ -z "$new" ]; then return; fi
    temporary=$archive.$(uname -n).$$
    if ! { mkdir -p "$SQUAD_CACHE" && timeout 20 tar -czf "$temporary" -C "$compiled" . &&
        mv -f "$temporary" "$archive"; } 2>/dev/null; then
        say "the compiled code is not kept: $archive cannot be written"
        rm -f "$temporary" 2>/dev/null || true
    fi
}
