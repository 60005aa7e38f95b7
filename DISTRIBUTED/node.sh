#!/bin/bash
# What run_2x2.sbatch starts on each node: says where it is, checks what it was given, and starts torchrun.
set -euo pipefail
node=${SLURM_NODEID:-$NODE}  # a node's number in the job; its host name says nothing, it may be another than SLURM's
address=$(getent ahosts "$MASTER_ADDR" | awk '{ print $1; exit }') || true
echo "node $node of $NODES: $(uname -n) at $(hostname -I | xargs), meets the others at $MASTER_ADDR (${address:-no address}), port $MASTER_PORT;" \
    "$RANKS ranks of $OMP_NUM_THREADS threads; interface: ${NCCL_SOCKET_IFNAME:-${GLOO_SOCKET_IFNAME:-not set}}"

fail() { echo "node $node: $*" >&2; exit 2; }
[ -n "$address" ] || fail "MASTER_ADDR=\"$MASTER_ADDR\" has no address here: set it to the first node's"
if [[ -n ${SLURM_JOB_ID:-} && $NODES -gt 1 && $address =~ ^(127\.|::1$) && ($MASTER_ADDR =~ ^(localhost|127\.|::1) || $node != 0) ]]; then
    fail "MASTER_ADDR=$MASTER_ADDR is this node itself ($address): $NODES nodes cannot meet there, set it to the first node's address"
fi
options=()
if [ "$GPU_COUNT" -gt 0 ]; then  # as the first node has GPUs, this one must
    found=$(nvidia-smi -L 2>/dev/null | grep -c '^GPU') || true
    [ "${found:-0}" -ge "$GPUS_PER_NODE" ] || fail "has ${found:-0} GPUs and should use $GPUS_PER_NODE: leave it out (sbatch -x $(uname -n))"
    CUDA_VISIBLE_DEVICES=$(cut -d, -f "-$GPUS_PER_NODE" <<<"${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((found - 1)))}")
    export CUDA_VISIBLE_DEVICES
    # Each rank on its GPU's socket. Only where the job has all cores: else a GPU's socket may have none of them.
    if [ "${NUMA:-yes}" = yes ] && command -v numactl >/dev/null && [ "$(env -u OMP_NUM_THREADS nproc)" = "$(nproc --all)" ]; then
        options+=(--numa-binding=node)
    fi
fi

# The signals are for the ranks, which have handlers of their own. torchrun would die of USR1 and end the ranks at a TERM, so it
# starts deaf to them. SLURM may signal a step's first process only (proctrack/cgroup does), so that is this one, which tells the ranks.
trap '' USR1 TERM INT
export PET_SIGNALS_TO_HANDLE=SIGHUP PET_SHUTDOWN_TIMEOUT=5  # seconds for the others of a node when one rank has died (torch 2.11: 30)
export PYTHONWARNINGS=${PYTHONWARNINGS-ignore::FutureWarning}  # DDP renames an option that older torch needs
export TORCH_CPP_LOG_LEVEL=${TORCH_CPP_LOG_LEVEL:-ERROR}     # or every connection warns where addresses have no names
python -m torch.distributed.run --nnodes="$NODES" --nproc-per-node="$RANKS" --node-rank="$node" \
    --master-addr="$MASTER_ADDR" --master-port="$MASTER_PORT" --rdzv-conf=timeout=120 "${options[@]}" "$@" &
agent=$!
( # a word where the ranks do not start, since the wait is silent
    for _ in {1..100}; do sleep 0.2; kill -0 "$agent" 2>/dev/null || exit 0; done
    pgrep -P "$agent" >/dev/null ||
        echo "node $node: waits since 20 s for the other nodes at $MASTER_ADDR ($address), port $MASTER_PORT; gives up after 120 s"
) &
trap 'pkill -USR1 -P "$agent" || [ -n "${SLURM_JOB_ID:-}" ] || kill -KILL "$agent"' USR1 TERM INT  # no rank yet: nothing to save
while kill -0 "$agent" 2>/dev/null; do wait "$agent" || true; done  # a signal ends a wait: wait again
code=0; wait "$agent" || code=$?
exit "$code"
