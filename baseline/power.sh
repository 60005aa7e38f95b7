# The power of a run's GPUs, once a second, into a file in the run's folder: power-0.csv is that of
# node 0, and so on. report.py integrates it over the training. job.sh and node.sh source it.
# shellcheck shell=bash

# sample_power FOLDER PID NODE: until the process PID has ended, in whatever way. Each life of a run
# adds to the file. It never fails a run; without a GPU, or of a finished run, it does nothing.
sample_power() {
    if [ "${GPU_COUNT:-0}" = 0 ] || [ -e "$1/results.json" ]; then return; fi
    (
        trap '' USR1 TERM INT  # a run that is asked to stop still saves
        while [ ! -d "$1" ] && kill -0 "$2"; do sleep 1; done  # train.py makes the folder
        # Times in UTC, as they name no zone. Each line is written at once: it will be killed.
        TZ=UTC0 stdbuf -oL nvidia-smi ${CUDA_VISIBLE_DEVICES:+--id="$CUDA_VISIBLE_DEVICES"} \
            --query-gpu=timestamp,index,power.draw --format=csv,noheader,nounits -l 1 \
            >>"$1/power-$3.csv" &
        while kill -0 "$2"; do sleep 1; done
        kill -KILL $!
    ) </dev/null >/dev/null 2>&1 &
}
