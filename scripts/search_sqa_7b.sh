#!/usr/bin/env bash
# Searches hyperparameters on the validation split, and draws the report (with
# JOBS=1, plot_results.py does). The same command again, on this node or another,
# adds workers to the same study, and goes on with what was interrupted.
# Arguments are flags of search.py and, after --, of train.py for all trials.
#   STUDY=./search-7B         the study's folder
#   JOBS=GPUS                 trials at once on this node, which share its GPUs
#                             (1: all for one; auto: more where the base is small)
# Example:
#   JOBS=4 bash scripts/search_sqa_7b.sh --trials 64 -- --epochs 5
source "$(dirname "$0")/common.sh"
export STUDY=${STUDY:-$OUTPUT_ROOT/search-$MODEL}
JOBS=${JOBS:-$GPUS}
[ "$NODES" -eq 1 ] || fail "a trial runs on one node: sbatch slurm/search.sbatch starts an array of workers"
check_jobs

# work SLOT FLAG...: a worker on its share of the GPUs
work() {
    forward_signals
    take_share "$1"
    export TQDM_POSITION=$1 LAVIN_WORKER=$1
    JOBS=1 run bash scripts/search_sqa_7b.sh "${@:2}"
}

if [ "$JOBS" -gt 1 ]; then
    in_parallel "$@"
    run python plot_results.py "$STUDY" --out "$STUDY/report"
    exit
fi

search=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    search+=("$1")
    shift
done
run python search.py --study "$STUDY" --gpus "$GPUS" "${search[@]}" -- --llm_model "$MODEL" \
    --llama_model_path "$WEIGHTS" --data_root "$DATA_ROOT" "${SETUP[@]}" "${@:2}"
