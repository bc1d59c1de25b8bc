#!/usr/bin/env bash
# All eight methods: skips what is finished, goes on past a failure and names it at the end.
# SEEDS="0 1 2" repeats each; JOBS=2 runs two at once, for CPUs; arguments go to every method; the environment is that
# of scripts/common.sh.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"

METHODS="base cyclical step exponential drop_inc drop_dec drop_inc_v2 drop_dec_v2"

run_folder() { echo "${OUTPUT_ROOT:-.}/LaVIN-${MODEL:-7B}-$1-seed$2"; }

# run_method FAILED METHOD SEED FLAG...: adds its folder to the file FAILED where it fails.
run_method() {
    local failed=$1 method=$2 seed=$3 run script="scripts/finetuning_sqa_7b_$2.sh"
    run=$(run_folder "$method" "$seed")
    shift 3
    if [ -f "$run/scores.json" ]; then
        echo "== $method, seed $seed: finished before ($run)"
        return
    fi
    echo "== $method, seed $seed"
    bash "${script/_base/}" --seed "$seed" --output_dir "$run" "$@" || echo "$run" >> "$failed"
}
export -f run_method run_folder

failed=$(mktemp)
trap 'rm "$failed"' EXIT
# shellcheck disable=SC2016 # the new shell expands it; each job's progress bar has a line of its own
for seed in ${SEEDS:-0}; do
    for method in $METHODS; do echo "$method $seed"; done
done | xargs -P "${JOBS:-1}" --process-slot-var TQDM_POSITION -I {} bash -c 'run_method "$0" $1 "${@:2}"' "$failed" {} "$@"

runs=()
for seed in ${SEEDS:-0}; do
    for method in $METHODS; do
        run=$(run_folder "$method" "$seed")
        grep -qxF "$run" "$failed" || runs+=("$run")
    done
done
[ ${#runs[@]} -eq 0 ] || python plot_results.py "${runs[@]}" --out "${OUTPUT_ROOT:-.}/plots" || echo plot_results.py >> "$failed"
if [ -s "$failed" ]; then
    echo "failed: $(paste -sd " " "$failed")" >&2
    exit 1
fi
