#!/bin/bash
# What run_2x2.sbatch starts on each node: it checks what the node has, and starts torchrun there.
#   bash node.sh train.py [options]
set -euo pipefail
root=$(dirname "$0")/..
node=${SLURM_NODEID:-$NODE}  # its number in the job; its host name may not be SLURM's name for it
say() { echo "node $node: $*"; }
fail() { say "error: $*" >&2; exit 2; }

# The signals are for run_2x2.sbatch and the ranks: torchrun would die of them and end the ranks.
trap '' USR1 TERM INT

address=$(getent ahosts "$MASTER_ADDR" | awk '{ print $1; exit }') || true
[ -n "$address" ] || fail "MASTER_ADDR=\"$MASTER_ADDR\" has no address: set it to the first node's"
if [ -n "${SLURM_JOB_ID:-}" ] && [ "$NODES" -gt 1 ] && [[ $address =~ ^(127\.|::1$) ]]; then
    # The first node may know its own name as a loopback address.
    if [ "$node" != 0 ] || [[ $MASTER_ADDR =~ ^(localhost|127\.|::1) ]]; then
        fail "MASTER_ADDR=$MASTER_ADDR ($address) is this node itself: set it to the first node's"
    fi
fi

options=()
if [ "$GPU_COUNT" -gt 0 ]; then  # the first node has GPUs, so this one must
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    [ "${found:-0}" -ge "$GPUS_PER_NODE" ] ||
        fail "has ${found:-0} GPUs of $GPUS_PER_NODE: leave it out (sbatch -x $(uname -n))"
    all=${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((found - 1)))}
    CUDA_VISIBLE_DEVICES=$(cut -d, -f "-$GPUS_PER_NODE" <<<"$all")
    export CUDA_VISIBLE_DEVICES
    # Each rank on its GPU's socket; if the job has not all cores, a socket may have none of its.
    cores=$(env -u OMP_NUM_THREADS nproc)
    if [ "${NUMA:-yes}" = yes ] && [ "$cores" = "$(nproc --all)" ] && command -v numactl >/dev/null
    then
        options+=(--numa-binding=node)
    fi
    # NCCL tells only in its log how it connects. Node 0 sees both kinds: within it, and to others.
    if [ -n "${NCCL_LOG:-}" ] && [ "$node" = 0 ]; then
        export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET NCCL_DEBUG_FILE=$NCCL_LOG-%p
    fi
fi

scratch=$(mktemp -d 2>/dev/null || mktemp -d -p /tmp)  # TMPDIR may be another node's
trap 'rm -rf "$scratch"' EXIT
source "$root/baseline/compiled.sh"
source "$root/baseline/power.sh"
unpack_compiled "$scratch/compiled"

interface=${NCCL_SOCKET_IFNAME:-${GLOO_SOCKET_IFNAME:-}}
say "$(uname -n) at $(hostname -I | xargs), $RANKS ranks, OMP_NUM_THREADS=$OMP_NUM_THREADS, meets" \
    "the others at $MASTER_ADDR ($address), port $MASTER_PORT${interface:+, through $interface}"
export PET_SIGNALS_TO_HANDLE=SIGHUP  # torchrun's own list would make it hear the others again
export PET_SHUTDOWN_TIMEOUT=5  # seconds that ranks have to end in when one has failed, not 30
export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::FutureWarning}  # of DDP's, on every rank
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}  # or a warning per address without a name
python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --node-rank="$node" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --rdzv-conf=timeout=120 \
    "${options[@]}" "$@" &
agent=$!
sample_power "$POWER_FOLDER" "$agent" "$node"

# torchrun waits for the other nodes in silence, and starts the ranks when all are there.
SECONDS=0
told=''
until pgrep -P "$agent" >/dev/null || ! kill -0 "$agent" 2>/dev/null; do
    if [ "$SECONDS" -ge 20 ] && [ -z "$told" ]; then
        say "torchrun has not yet loaded, or waits for the other nodes (120 s at most)"
        told=yes
    fi
    sleep 0.2
done
waited=$SECONDS code=0
wait "$agent" || code=$?
if [ "$node" = 0 ]; then pack_compiled; fi
if [ "$code" != 0 ] && [ "$waited" -gt 100 ]; then
    say "no rank has started in $waited s. If torchrun has timed out, see above, try another" \
        "MASTER_PORT, or another network: MASTER_ADDR, NCCL_SOCKET_IFNAME" >&2
fi
exit "$code"
