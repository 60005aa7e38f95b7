#!/bin/bash
# What one machine with one GPU and no internet tells of these scripts in at most ten minutes: that
# the fast ways compute what the plain ones do, each rung of the ladder, speed at batches of 32 and
# 128, the usual ways beside them, a trace, and each strategy with one NCCL rank. From the project's
# root, with a folder SHARED that has minilm/ and squad/ (they are not of the project):
#   OUT=folder bash baseline/benchmarks/gpu_day.sh
# It leaves $OUT/gpu.tgz (the tests' log, each run's results.json, timings.json and trace, bench,
# the ceiling of the multiplications, a report), written anew after each part: being cut off, or a
# part that fails, costs one part. Needs torch, transformers, numpy, tensorboard and pytest.
# BERT-Base with random weights, real questions: times, losses and memory are real, F1 is nothing.
# May be set: SHARED, WORK, PARTS (a pattern: only parts of such names), MINUTES (after them no part
# is begun), LIMIT (seconds a part may take); and to rehearse it DEVICE (cpu), STEPS, BATCH, LAYERS.
set -uo pipefail
out=${OUT:?the folder that gpu.tgz is to be in}
shared=${SHARED:-../shared}
work=${WORK:-$(mktemp -d)}
device=${DEVICE:-cuda}
steps=${STEPS:-60}
batch=${BATCH:-32} large=$((4 * ${BATCH:-32}))
seconds=$((60 * ${MINUTES:-9}))
limit=${LIMIT:-120}
log=$work/log
data=(--train-file "$shared/squad/train.json" --validation-file "$shared/squad/dev.json")

mkdir -p "$work" "$out"
export SQUAD_CACHE=$work/cache TORCHINDUCTOR_CACHE_DIR=$work/inductor HF_HUB_OFFLINE=1
export PYTHONUNBUFFERED=1

say() { echo "$*" | tee -a "$log"; }

keep() {  # packs what there is by now
    local leave_out=(--exclude=./base --exclude=./cache --exclude=./inductor)
    tar czf "$work.tgz" -C "$work" "${leave_out[@]}" . && mv "$work.tgz" "$out/gpu.tgz"
}

# part NAME COMMAND...: runs it if it is wanted and there is time, its output in $work/NAME.log
part() {
    local name=$1 code=0
    shift
    # shellcheck disable=SC2053  # a pattern
    if ! [[ $name == ${PARTS:-*} ]]; then return; fi
    if [ "$SECONDS" -gt "$seconds" ]; then
        say "== $name: not begun, as $SECONDS s are over"
        return
    fi
    say "== $name, after $SECONDS s"
    timeout -k 10 "$limit" "$@" >"$work/$name.log" 2>&1 || code=$?
    if [ "$code" != 0 ]; then say "$name failed ($code):"; fi
    grep -E '^(an epoch|MFU|memory|phases|error)|passed|skipped|\|' "$work/$name.log" |
        tail -n 12 | tee -a "$log"
    rm -rf "${work:?}/$name/model" "$work/$name/checkpoint.pt"
    keep
}

# Evaluated only once. At this rate random weights stay finite in any precision.
usual=(--device "$device" --model "$work/base" "${data[@]}" --epochs 8 --evaluate-every end)
usual+=(--learning-rate 1e-5 --max-steps "$steps" --batch-size "$batch")

single() {  # NAME OPTIONS...: one training by baseline/train.py
    part "$1" python3 baseline/train.py "${usual[@]}" --output "$work/$1" --no-profile "${@:2}"
}

one_rank() {  # NAME OPTIONS...: one by DISTRIBUTED/train.py, through torchrun
    part "$1" python3 -m torch.distributed.run --standalone --nproc-per-node=1 \
        DISTRIBUTED/train.py "${usual[@]}" --output "$work/$1" --no-profile \
        --max-steps $((steps / 2)) "${@:2}"
}

say "$(nvidia-smi 2>&1)"
python3 - "$shared/minilm" "$work/base" "${LAYERS:-12}" 2>&1 <<'END' | tee -a "$log"
import sys

import torch
import transformers

tokenizer_folder, model_folder, layers = sys.argv[1:]
device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
print(torch.__version__, transformers.__version__, device)
transformers.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
config = transformers.BertConfig(vocab_size=len(tokenizer), num_hidden_layers=int(layers))
torch.manual_seed(0)
transformers.BertForQuestionAnswering(config).save_pretrained(model_folder)
tokenizer.save_pretrained(model_folder)
END

# 1. Is it right? Each fast way against the plain one.
part tests python3 -m pytest -c baseline/tests/pytest.ini --rootdir=. -m gpu -q -rs \
    baseline/tests/test_gpu.py DISTRIBUTED/tests/test_gpu.py

# 2. The ladder, shortened. The first run builds the features; compiled kernels are kept.
plain=(--no-fused --no-compile)
single 1-fp32 --precision fp32 --batching padded "${plain[@]}" --max-steps $((steps / 2))
single 2-tf32 --precision tf32 --batching padded "${plain[@]}"
single 3-bf16 --batching padded "${plain[@]}"
single 4-fused --batching padded --no-compile
single 5-dynamic --batching dynamic --no-compile
single 6-bucketed --batching bucketed --no-compile
single 7-packed --no-compile
single 8-compiled --compile
single 9-graphed --compile --cuda-graph

# 3. Larger batches, and buckets compiled.
single "packed-$large" --batch-size "$large"
single "packed-$large-graphed" --batch-size "$large" --cuda-graph
single "bucketed-$large" --batch-size "$large" --batching bucketed
single "bucketed-$batch" --batching bucketed

# 4. The usual ways: a plain loop, and transformers' Trainer where accelerate is.
part bench python3 baseline/benchmarks/bench.py --device "$device" --model "$shared/minilm" --base \
    --data "$shared/squad/train.json" --batch-size "$batch" --steps "$steps" --warmup 5 \
    --output "$work/bench.json"

# 5. Where the time goes.
single "packed-$large-traced" --batch-size "$large" --profile

# 6. One rank of each strategy.
for strategy in ddp zero2 fsdp; do
    one_rank "$strategy" --strategy "$strategy"
done
one_rank ddp-traced --strategy ddp --profile

# 7. What was predicted beside what was measured, what the multiplications alone reach, and tables.
finished=()
for results in "$work"/*/results.json; do finished+=("$(dirname "$results")"); done
part predicted python3 baseline/benchmarks/predict.py --measured "${finished[@]}"
part ceiling python3 baseline/benchmarks/cost.py ceiling --device "$device" \
    --output "$work/ceiling.json"
part report python3 baseline/report.py "${finished[@]}"
keep
say "done after $SECONDS s: $out/gpu.tgz"
