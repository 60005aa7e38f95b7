# What the sbatch scripts share. Each sources it as soon as it has found the project, its $name set.
# It chooses the run's folder, listens for signals and enters the environment; then it offers run,
# finish_run and finish.
# shellcheck shell=bash disable=SC2154

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
trap '' PIPE  # Ctrl-C ends `| tee` too, and then nothing that is said must end this script
say() { echo "$name: $*" >&2 || true; }
source "$root/baseline/compiled.sh"
source "$root/baseline/power.sh"

# 1. The run's folder: the --output among the arguments, or a new one.

# value_of OPTION DEFAULT ARGUMENT...: what the arguments give to the option
value_of() {
    local option=$1 value=$2 before='' argument
    for argument in "${@:3}"; do
        if [ "$before" = "$option" ]; then value=$argument; fi
        if [[ $argument == "$option="* ]]; then value=${argument#*=}; fi
        before=$argument
    done
    printf '%s\n' "$value"
}
output=$(value_of --output "runs/$name-${SLURM_JOB_ID:-$(date +%Y%m%d-%H%M%S)}" "$@")
folder=$output  # ladder.sbatch and scaling.sbatch have an output in it for each of their runs
finished_before=''
if [ -e "$output/results.json" ]; then finished_before=yes; fi

# 2. Being asked to stop. A signal makes this script leave a file, $output/stop. train.py looks for
# it between steps, saves and ends. So a request counts whatever is under way when it comes: pip,
# imports, compiling. A person may ask in the same way: touch runs/.../stop

# What SLURM calls this job. Of an array only this task: its last one has the array's own number.
job_id=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job_id=${job_id:-${SLURM_JOB_ID:-}}

# Only an earlier start's is removed: scaling.sbatch asks its runs by this file.
if [ -z "${PART_OF:-}" ]; then rm -f -- "$output/stop"; fi

stopped_by=''
ask_to_stop() {
    if [ "$stopped_by" != TERM ]; then stopped_by=$1; fi  # who is cancelled stays cancelled
    if ! mkdir -p -- "$output" || ! touch -- "$output/stop"; then say "cannot tell train.py"; fi
    say "asked to stop ($2), which may take a moment: what has been trained is saved"
}
check_limit() {  # SLURM warns at once where the limit is shorter than the warning's time
    local limit=''
    if [ -n "$job_id" ]; then limit=$(squeue -h -j "$job_id" -o %l 2>/dev/null) || true; fi
    if [ "$SECONDS" -lt 60 ] && [[ $limit == ?:?? ]]; then
        say "warned $SECONDS s after its start: a limit of $limit is too short for a warning that" \
            "comes three minutes before it, or so: raise --time, or give --signal=B:USR1@60"
    fi
}

trap 'ask_to_stop USR1 "the time is nearly up"; check_limit' USR1  # from SLURM, by --signal
trap 'ask_to_stop TERM "cancelled or preempted"' TERM              # from scancel or SLURM
trap 'ask_to_stop INT "Ctrl-C"' INT
if [ -n "${early:-}" ]; then kill -s "$early" $$; fi

# run COMMAND...: runs it and returns its exit code, or 75 at once if asked to stop before.
# The command starts deaf to the signals, which would end it before it can save.
run() {
    local code=0 pid
    if [ -n "$stopped_by" ]; then return 75; fi
    note_gpus before
    (trap '' USR1 TERM INT; "$@") &
    pid=$!
    while kill -0 "$pid" 2>/dev/null; do wait "$pid" || true; done  # a signal interrupts wait
    wait "$pid" || code=$?
    note_gpus after
    return "$code"
}

# finish CODE: ends this script. A job that ran out of time first goes back to SLURM's queue.
finish() {
    local code=$1
    pack_compiled
    rm -f -- "$output/stop"
    # Asked to stop, and not finished: but a failure of its own (1, 2) stays one.
    if [ -n "$stopped_by" ] && [[ $code != [12] ]] && [ ! -e "$output/results.json" ]; then
        code=75
        echo "$name: stopped before the end (exit code 75)" || true
    fi
    if [ "$code" = 75 ] && [ -n "$job_id" ] && [ -z "${PART_OF:-}" ]; then
        if [ "$stopped_by" = USR1 ]; then
            if makes_progress; then go_back; fi
        elif [ -z "$stopped_by" ] && is_preempted; then
            echo "$name: preempted"
            go_back
        fi
    else
        rm -f -- "$folder/.starts"
    fi
    exit "$code"
}

# With GraceTime SLURM first tells only srun's processes, which have ended when this is asked.
is_preempted() { [[ $(scontrol show job "$job_id") == *PreemptTime=[0-9]* ]]; }

go_back() {
    echo "$name: job $job_id goes back to the queue and goes on later"
    trap '' USR1 TERM  # SLURM ends this script now
    scontrol requeue "$job_id" || say "it cannot: submit it again, with --output $output"
}

# What is finished or saved, with its times.
list_saved() { stat -c '%n %Y' -- "$folder"/{,*/}{checkpoint.pt,results.json} 2>/dev/null || true; }

# makes_progress: fails at the third start in a row that has saved nothing. .starts has their times.
makes_progress() {
    if [ "$(list_saved)" != "$saved_before" ]; then
        rm -f -- "$folder/.starts"
        return
    fi
    mkdir -p -- "$folder"
    date >>"$folder/.starts"
    if [ "$(wc -l <"$folder/.starts")" -ge 3 ]; then
        say "three starts in a row have saved nothing: it does not go back to the queue." \
            "Submit it again with more time (--time)"
        rm -f -- "$folder/.starts"
        return 1
    fi
}

# finish_run CODE: the same after one training. It is finished where it has left results.json.
finish_run() {
    local code=$1
    if [ -z "$finished_before" ] && [ -e "$output/results.json" ]; then
        keep_machine_facts
        python "$root/baseline/trace.py" --tensorboard "$output" 2>"$scratch/trace" ||
            say "the profiled step is not drawn: $(tail -n 1 "$scratch/trace")"
        code=0
    fi
    finish "$code"
}

if [ "${SLURM_RESTART_COUNT:-0}" = 0 ]; then rm -f -- "$folder/.starts"; fi
saved_before=$(list_saved)

# 3. What only the machine can tell, left beside the results for report.py. It never fails a run.

scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

note_gpus() {  # before | after
    local file=$scratch/nvidia-smi-$1.csv
    local fields=name,driver_version,power.limit,power.draw,clocks.sm,clocks.max.sm,clocks.mem
    local ask=(nvidia-smi --format=csv ${CUDA_VISIBLE_DEVICES:+--id="$CUDA_VISIBLE_DEVICES"})
    fields+=,temperature.gpu
    "${ask[@]}" --query-gpu="$fields,clocks_throttle_reasons.active" >"$file" 2>/dev/null ||
        "${ask[@]}" --query-gpu="$fields" >"$file" 2>/dev/null || rm -f "$file"
}

with_power() {  # COMMAND...: for run, which starts it in a process of its own, BASHPID
    sample_power "$output" "$BASHPID" 0
    "$@"
}

keep_machine_facts() {  # where the run is finished
    [ -e "$output/results.json" ] || return 0
    if [ -n "${SLURMD_NODENAME:-}" ]; then
        scontrol show node "$SLURMD_NODENAME" >"$scratch/slurm-node.txt" || true
        echo "SLURM_JOB_CPUS_PER_NODE=${SLURM_JOB_CPUS_PER_NODE:-}" >>"$scratch/slurm-node.txt"
    fi
    cp -n "$scratch"/{nvidia-smi,slurm-node}* "$output" 2>/dev/null || true
}

# 4. The environment.

commit=$(git -C "$root" describe --always --dirty --exclude '*' 2>/dev/null) || commit=unknown
job="no SLURM"
if [ -n "${SLURM_JOB_ID:-}" ]; then
    job="SLURM job $SLURM_JOB_ID, start $((1 + ${SLURM_RESTART_COUNT:-0}))"
    if [ "${SLURM_RESTART_COUNT:-0}" != 0 ]; then echo; fi  # the log goes on
fi
options=" none"
if [ $# != 0 ]; then printf -v options ' %q' "$@"; fi
echo "$name: on $(uname -n), $job, commit $commit, options:$options"

if ! source "$root/baseline/env.sh"; then
    if [ -n "$stopped_by" ]; then finish 75; fi  # its pip may have died of the same signal
    exit 1
fi
if command -v nvidia-smi >/dev/null && [ "$GPU_COUNT" -lt "${SLURM_GPUS_ON_NODE:-0}" ]; then
    say "SLURM gave $SLURM_GPUS_ON_NODE GPUs on $(uname -n), torch sees $GPU_COUNT:" \
        "leave this node out (sbatch -x) and tell the administrators"
    exit 1
fi
cores=$(env -u OMP_NUM_THREADS nproc)  # nproc knows which cores this job may use, if SLURM binds it
if [ "$cores" -gt "${SLURM_CPUS_PER_TASK:-$cores}" ]; then cores=$SLURM_CPUS_PER_TASK; fi

use_one_gpu() {  # the first, where several are here: a whole node (--exclusive), or no SLURM
    if [ "$GPU_COUNT" -gt 1 ]; then
        local first=${CUDA_VISIBLE_DEVICES:-0}
        export CUDA_VISIBLE_DEVICES=${first%%,*}
        echo "$GPU_COUNT GPUs are here; one is used, CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES"
    fi
}
