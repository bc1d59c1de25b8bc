#!/usr/bin/env bash
# Scores a run on MME. The first argument is the run, unless --adapter_path names
# it; others are flags of eval_mme.py.
#   MME_ROOT=DATA_ROOT/mme    folder of MME's subtasks
# Example:
#   bash scripts/eval_mme_benchmark.sh LaVIN-13B-VLIT
source "$(dirname "$0")/common.sh"
if [ $# -eq 0 ]; then
    echo "name a run: bash scripts/eval_mme_benchmark.sh LaVIN-13B-VLIT" >&2
    exit 1
fi
run=()
if [[ $1 != -* ]]; then # else --adapter_path is among the flags
    run=(--adapter_path "$1")
    shift
fi
launch eval_mme.py "${run[@]}" --mme_root "${MME_ROOT:-$DATA_ROOT/mme}" --max_batch_size 16 "$@"
