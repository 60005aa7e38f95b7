#!/bin/bash
# What one machine with one GPU and no internet tells of these scripts in about 8 minutes: how fast
# each batching and precision is, eager and compiled, and each strategy with one NCCL rank. From the
# project's root, with a folder SHARED that has minilm/ and squad/ (they are not of the project):
#   OUT=folder bash baseline/benchmarks/gpu_day.sh
# It leaves $OUT/gpu.tgz (each run's results.json, timings.json and trace, the log, the ceiling of
# the multiplications), written anew after each run: being cut off costs one run. Show it with
#   python baseline/report.py FOLDER/*/
# BERT-Base with random weights, real questions: times, losses and memory are real, F1 is nothing.
# May be set: SHARED, WORK, RUNS (a pattern: only runs of such names), MINUTES (after them no run is
# begun), LIMIT (seconds a run may take); and to rehearse it STEPS and LAYERS of the model.
set -uo pipefail
out=${OUT:?the folder that gpu.tgz is to be in}
shared=${SHARED:-../shared}
work=${WORK:-$(mktemp -d)}
steps=${STEPS:-60}
seconds=$((60 * ${MINUTES:-8}))
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

wanted() {  # NAME: whether it is to be run
    # shellcheck disable=SC2053  # a pattern
    [[ $1 == ${RUNS:-*} ]]
}

# run NAME COMMAND...: one training of 60 steps, whose folder keeps neither model nor checkpoint
run() {
    local name=$1
    shift
    if ! wanted "$name"; then return; fi
    if [ "$SECONDS" -gt "$seconds" ]; then
        say "== $name: not begun, as $SECONDS s are over"
        return
    fi
    say "== $name, after $SECONDS s"
    # Evaluated only once. At this rate random weights stay finite in any precision.
    timeout -k 10 "${LIMIT:-120}" "$@" --output "$work/$name" --device cuda \
        --model "$work/base" "${data[@]}" \
        --epochs 8 --evaluate-every end --learning-rate 1e-5 >"$work/last" 2>&1
    local code=$?
    cat "$work/last" >>"$log"
    if [ "$code" != 0 ]; then
        say "$name failed ($code):"
        tail -n 3 "$work/last"
    else
        grep -E '^(an epoch|MFU|memory|phases)' "$work/last"
    fi
    rm -rf "${work:?}/$name/model" "$work/$name/checkpoint.pt" "$work/last"
    keep
}

single() {  # NAME OPTIONS...
    local name=$1
    shift
    run "$name" python3 baseline/train.py --max-steps "$steps" "$@"
}

one_rank() {  # NAME OPTIONS...: through torchrun, with NCCL
    local name=$1
    shift
    run "$name" python3 -m torch.distributed.run --standalone --nproc-per-node=1 \
        DISTRIBUTED/train.py --max-steps $((steps * 2 / 5)) --batch-size 32 "$@"
}

say "$(nvidia-smi 2>&1)"
python3 - "$shared/minilm" "$work/base" "${LAYERS:-12}" 2>&1 <<'END' | tee -a "$log"
import sys

import torch
import transformers

tokenizer_folder, model_folder, layers = sys.argv[1:]
print(torch.__version__, transformers.__version__, torch.cuda.get_device_name())
transformers.logging.disable_progress_bar()
tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
config = transformers.BertConfig(vocab_size=len(tokenizer), num_hidden_layers=int(layers))
torch.manual_seed(0)
transformers.BertForQuestionAnswering(config).save_pretrained(model_folder)
tokenizer.save_pretrained(model_folder)
END

# What matters most comes first. The first run builds the features; compiled kernels are kept.
single packed-128 --no-profile --batch-size 128
single bucketed-128 --no-profile --batch-size 128 --batching bucketed
single packed-32 --no-profile --batch-size 32
single packed-32-eager --no-profile --batch-size 32 --no-compile
single dynamic-32-eager --no-profile --batch-size 32 --no-compile --batching dynamic
single padded-32-fp32 --no-profile --batch-size 32 --no-compile --batching padded --precision fp32 \
    --max-steps $((steps * 2 / 5))
single packed-128-traced --profile --batch-size 128
single packed-128-eager --no-profile --batch-size 128 --no-compile
single bucketed-32 --no-profile --batch-size 32 --batching bucketed
single bucketed-32-eager --no-profile --batch-size 32 --no-compile --batching bucketed
single padded-32-eager --no-profile --batch-size 32 --no-compile --batching padded
for strategy in ddp zero2 fsdp; do
    one_rank "$strategy" --no-profile --strategy "$strategy"
done
one_rank ddp-traced --profile --strategy ddp

if wanted ceiling; then
    say "== what the multiplications alone reach, after $SECONDS s"
    timeout "${LIMIT:-120}" python3 baseline/benchmarks/cost.py ceiling --device cuda \
        --output "$work/ceiling.json" 2>&1 | tee -a "$log"
fi
keep
say "done after $SECONDS s: $out/gpu.tgz"
