#!/usr/bin/env bash
# From a clone to a comparison of the eight methods, on a CPU: mini ScienceQA, a toy base, and the experiment scripts
# as they run on a cluster. What exists is used again; results go to runs/quickstart.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt

export DATA_ROOT=data/mini WEIGHTS=weights MODEL=toy OUTPUT_ROOT=runs/quickstart GPUS=1
[ -f "$DATA_ROOT/problems.json" ] || python tools/make_mini_scienceqa.py --out "$DATA_ROOT"
[ -f "$WEIGHTS/$MODEL/consolidated.00.pth" ] || python tools/make_toy_base.py --data_root "$DATA_ROOT" --out "$WEIGHTS/$MODEL"

FLAGS=(--vision_model "$WEIGHTS/$MODEL/vit" --device cpu
       --batch_size 8 --accum_iter 1 --epochs 2 --warmup_epochs 0.3 --blr 0.16)

echo "== the untuned base"
python eval.py --ckpt_dir "$WEIGHTS" --llm_model "$MODEL" --vision_model "$WEIGHTS/$MODEL/vit" --device cpu \
    --data_root "$DATA_ROOT" --output_dir "$OUTPUT_ROOT/untuned"
# so small a model gains little from a second thread: two methods at once take two thirds of the time
export JOBS=2 OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
exec bash scripts/run_all_variants.sh "${FLAGS[@]}"
