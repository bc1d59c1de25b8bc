#!/usr/bin/env bash
# All eight methods, one after another: skips what is finished, goes on past a failure and names it at the end.
# SEEDS="0 1 2" repeats each; arguments go to every method; the environment is that of scripts/common.sh.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"

METHODS="base cyclical step exponential drop_inc drop_dec drop_inc_v2 drop_dec_v2"
runs=() failed=()
for seed in ${SEEDS:-0}; do
    for method in $METHODS; do
        run="${OUTPUT_ROOT:-.}/LaVIN-${MODEL:-7B}-$method-seed$seed"
        if [ -f "$run/scores.json" ]; then
            echo "== $method, seed $seed: finished before ($run)"
        else
            echo "== $method, seed $seed"
            script="scripts/finetuning_sqa_7b_$method.sh"
            bash "${script/_base/}" --seed "$seed" --output_dir "$run" "$@" || { failed+=("$run"); continue; }
        fi
        runs+=("$run")
    done
done
[ ${#runs[@]} -eq 0 ] || python plot_results.py "${runs[@]}" --out "${OUTPUT_ROOT:-.}/plots" || failed+=("plot_results.py")
if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}" >&2
    exit 1
fi
