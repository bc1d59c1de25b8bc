#!/usr/bin/env bash
# The study on a real language model and real pictures: the eight methods, and
# every schedule with every dropout (run_factorial.sh), on the model and the data
# of quickstart_smollm2.sh. Each run learns from 80 questions for 20 epochs, which
# leaves room to differ, and answers 800 others. What exists is used again;
# results go to runs/study_smollm2, their tables to its folders plots and crossed.
# Arguments are flags of train.py. Installs what is missing as
# scripts/environment.sh does, whose variables hold.
#   SEEDS="0 1 2 3 4"         the seeds of each method
#   JOBS=auto                 runs at once, as in run_all_variants.sh
# Example:
#   SEEDS="0 1" bash scripts/study_smollm2.sh
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
export SEEDS=${SEEDS:-0 1 2 3 4} JOBS=${JOBS:-auto} DATA_ROOT=data/easy_vqa_80 OUTPUT_ROOT=runs/study_smollm2
BASE=weights/smollm2_study SIZES=(--train 80 --test 800)
source scripts/smollm2.sh

source scripts/gpus.sh
MACHINE=()
[ "$(visible_gpus)" -gt 0 ] || MACHINE=("${CPU[@]}")
FLAGS+=("${MACHINE[@]}" --batch_size 16 --epochs 20 --blr 0.06 --keep_last 1)
score_untuned "${MACHINE[@]}"
status=0
PLOTS=$OUTPUT_ROOT/crossed run bash scripts/run_factorial.sh "${FLAGS[@]}" "$@" || status=$?
[ "$status" -le 1 ] || exit "$status" # 1: a run has failed, which keeps no other from running; else stopped, or refused
run bash scripts/run_all_variants.sh "${FLAGS[@]}" "$@" || status=$?
exit "$status"
