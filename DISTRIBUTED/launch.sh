# What run_2x2.sbatch sources, after baseline/job.sh: it decides how many nodes and ranks there are
# and where they meet; then it offers start_ranks and tell_link.
# shellcheck shell=bash disable=SC2154

# 1. How many nodes, how many ranks on each, and where they meet.

if [ -n "${SLURM_JOB_ID:-}" ]; then
    NODES=${NODES:-$SLURM_JOB_NUM_NODES}
    GPUS_PER_NODE=${GPUS_PER_NODE:-${SLURM_GPUS_ON_NODE:-2}}
    hosts=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n "$NODES" | paste -sd,)
    # A port of the job's own, as two jobs can share a node.
    MASTER_PORT=${MASTER_PORT:-$((20000 + SLURM_JOB_ID % 10000))}
else
    if [ "$GPU_COUNT" -gt 0 ]; then NODES=1; else NODES=${NODES:-2}; fi
    GPUS_PER_NODE=${GPUS_PER_NODE:-$((GPU_COUNT > 0 ? GPU_COUNT : 2))}
    hosts=127.0.0.1
    cores=$((cores / NODES))
fi
RANKS=$GPUS_PER_NODE
case " $* " in
    *" --strategy dp "* | *" --strategy=dp "*)  # one process with all GPUs of one node
        NODES=1 RANKS=1 hosts=${hosts%%,*} ;;
esac
MASTER_ADDR=${MASTER_ADDR-${hosts%%,*}}

# Binds the port as torchrun will, and prints it: any free one if there is none yet.
bind='import socket, sys
listener = socket.socket()
listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
listener.bind(("", int(sys.argv[1])))
print(listener.getsockname()[1])'
if ! free_port=$(python -c "$bind" "${MASTER_PORT:-0}" 2>/dev/null); then
    say "port ${MASTER_PORT:-} is taken on $(uname -n): set MASTER_PORT"
    finish 2
fi
MASTER_PORT=$free_port
OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > RANKS ? cores / RANKS : 1))}
if [ -z "${NCCL_DEBUG:-}" ]; then export NCCL_LOG=$scratch/nccl; fi
export NODES RANKS GPUS_PER_NODE MASTER_ADDR MASTER_PORT OMP_NUM_THREADS
export POWER_FOLDER=$output  # each node samples the power of its own GPUs into it
export EXPECTED_WORLD_SIZE=$((NODES * RANKS))  # train.py --prepare checks the arguments for them

# 2. Starting them. Each node runs node.sh, which starts torchrun, which starts the node's ranks.

start_ranks() {  # COMMAND...: on each node
    local node code=0 pid pids=()
    if [ -n "${SLURM_JOB_ID:-}" ]; then
        # srun would take these for options; of the shell that called sbatch, they contradict these.
        unset SLURM_MEM_PER_CPU SLURM_MEM_PER_GPU SLURM_MEM_PER_NODE
        # When one node's ranks die, the others are ended too. srun 22.05 forgets --cpus-per-task;
        # the node's one task here gets the cores of all that sbatch was asked for.
        local cpus=$((${SLURM_CPUS_PER_TASK:-0} * ${SLURM_NTASKS_PER_NODE:-1}))
        srun --export=ALL --nodes="$NODES" --ntasks="$NODES" --ntasks-per-node=1 \
            --nodelist="$hosts" --kill-on-bad-exit=1 \
            ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$cpus"} "$@"
        return
    fi
    for ((node = 0; node < NODES; node++)); do
        NODE=$node "$@" &
        pids+=($!)
    done
    for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
    return "$code"
}

# 3. What NCCL has logged about its connections.

tell_link() {
    local links kinds='via (NET/[A-Za-z]+|P2P|SHM)'
    links=$(grep -ohE "$kinds" "$scratch"/nccl-* 2>/dev/null | sort -u) || return 0
    links=$(paste -sd, <<<"${links//via /}")
    echo "NCCL connected the GPUs by ${links//,/, }" \
        "(NET/IB: InfiniBand, NET/Socket: TCP, P2P and SHM: within a node)"
}
