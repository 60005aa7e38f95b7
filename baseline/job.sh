# What the sbatch scripts share; each sources it after it has found $root. Enters the environment, says what starts where, then
# offers job_wait, which passes signals on and lets a job queue itself again.
# shellcheck shell=bash disable=SC2154
source "$root/baseline/env.sh"

say() { echo "${name:?}: $*" >&2; }

commit=$(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null) || commit=unknown
echo "$name: commit $commit on $(uname -n), job ${SLURM_JOB_ID:-none (no SLURM)}, life $((1 + ${SLURM_RESTART_COUNT:-0})), options:$(printf ' %q' "$@")"

if [ -n "${SLURM_JOB_ID:-}" ] && command -v nvidia-smi >/dev/null && [ "$GPU_COUNT" -lt "${SLURM_GPUS_ON_NODE:-0}" ]; then
    say "SLURM gave $SLURM_GPUS_ON_NODE GPUs, torch sees $GPU_COUNT on $(uname -n): leave this node out (sbatch -x) and tell the administrators"
    exit 1
fi
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc knows which cores this job may use, where SLURM binds it to them
[ "$cores" -lt "${SLURM_CPUS_PER_TASK:-$cores}" ] || cores=${SLURM_CPUS_PER_TASK:-$cores}

# train.py leaves the marker when it was told to stop and has saved: a job goes back to the queue on that, not on an exit code.
# DISTRIBUTED also leaves its exit code, which torchrun would lose. All nodes see this folder.
job_folder=$PWD/runs/.job-${SLURM_JOB_ID:-$(uname -n)-$$}
mkdir -p "$job_folder" 2>/dev/null || job_folder=$(mktemp -d)  # train.py will say what is wrong with $PWD/runs
trap 'rm -rf "$job_folder"' EXIT
rm -f "$job_folder"/*  # an earlier life's
export REQUEUE_MARKER=$job_folder/requeue EXIT_CODE_FILE=$job_folder/exit-code PYTHONUNBUFFERED=1

# job_wait PID...: waits for them and returns the first exit code that is not 0. The script has a function `tell SIGNAL`.
stopped=''  # or the signal that came
job_wait() {
    local pid one code=0
    trap 'stopped=USR1; tell USR1 || true' USR1       # from SLURM: the time is nearly up
    trap 'stopped=TERM; tell TERM || true' TERM INT   # from a person: scancel, Ctrl-C
    for pid in "$@"; do
        while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done  # a signal ends a wait: wait again
        one=0
        wait "$pid" || one=$?
        [ "$code" != 0 ] || code=$one
    done
    if [ -s "$EXIT_CODE_FILE" ]; then code=$(cat "$EXIT_CODE_FILE"); fi
    if [ -e "$REQUEUE_MARKER" ] && [ "$stopped" = USR1 ] && [ -n "${SLURM_JOB_ID:-}" ]; then
        rm -rf "$job_folder"
        trap '' USR1 TERM  # requeueing ends this script
        echo "$name: saved before the time was up; job $SLURM_JOB_ID goes back to the queue and goes on from there"
        scontrol requeue "$SLURM_JOB_ID" || say "it cannot: the same command, with this run's --output, goes on from the checkpoint"
    fi
    return "$code"
}
