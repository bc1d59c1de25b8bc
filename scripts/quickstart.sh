#!/usr/bin/env bash
# From a clone to a comparison of the eight methods, on a CPU: mini ScienceQA, a
# toy base, and the experiment scripts as they run on a cluster. What exists is
# used again; results go to runs/quickstart. Arguments are flags of train.py, for
# all methods. Installs what is missing as scripts/environment.sh does, whose
# variables hold.
#   METHODS                   the methods, as in run_all_variants.sh
#   SEEDS=0                   the seeds of each
# Example:
#   SEEDS="0 1" METHODS="base step" bash scripts/quickstart.sh
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements.txt
export OUTPUT_ROOT=runs/quickstart
source scripts/toy.sh

echo "== the untuned base"
run python eval.py --ckpt_dir "$WEIGHTS" --llm_model "$MODEL" --vision_model "$WEIGHTS/$MODEL/vit" --device cpu \
    --data_root "$DATA_ROOT" --output_dir "$OUTPUT_ROOT/untuned"
exec bash scripts/run_all_variants.sh "${FLAGS[@]}" --blr 0.16 "$@"
