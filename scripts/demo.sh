#!/usr/bin/env bash
# Talk to finished runs in the browser, or in the terminal (--cli): those of
# quickstart_smollm2.sh, or else those of quickstart.sh, unless a variable or
# --runs names others. Other arguments go to demo.py (python demo.py --help).
# Installs what is missing as scripts/environment.sh does, whose variables hold.
#   MODEL=toy                 the base model of the runs
#   OUTPUT_ROOT=.             the runs; with MODEL=toy, runs/quickstart
#   DATA_ROOT=../data         ScienceQA, for examples; with MODEL=toy, data/mini
#   WEIGHTS=../data/weights   the base models; with MODEL=toy, weights
# Example:
#   MODEL=7B OUTPUT_ROOT=. bash scripts/demo.sh --cli
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
has_runs() { compgen -G "$1/*/checkpoint-*.pth" > /dev/null || compgen -G "$1/checkpoint-*.pth" > /dev/null; }
named= # by arguments
if [[ " $* " == *" --runs"[\ =]* || " $* " == *" --adapter_path"[\ =]* ]]; then named=1; fi

if [ -z "${MODEL:-}${OUTPUT_ROOT:-}$named" ] && has_runs runs/smollm2; then
    MODEL=smollm2.gguf OUTPUT_ROOT=runs/smollm2 DATA_ROOT=${DATA_ROOT:-data/easy_vqa} WEIGHTS=${WEIGHTS:-weights}
fi
MODEL=${MODEL:-toy}
if [ "$MODEL" = toy ]; then
    DATA_ROOT=${DATA_ROOT:-data/mini} WEIGHTS=${WEIGHTS:-weights} OUTPUT_ROOT=${OUTPUT_ROOT:-runs/quickstart}
fi
if [ -z "$named" ] && ! has_runs "${OUTPUT_ROOT:-.}"; then
    echo "no finished runs in ${OUTPUT_ROOT:-.}: run 'bash scripts/quickstart.sh' first, or name others with OUTPUT_ROOT and MODEL" >&2
    exit 1
fi
REQUIREMENTS=requirements/demo.txt
[[ " $* " != *" --cli "* ]] || REQUIREMENTS=requirements.txt # Gradio is for the page alone
source scripts/environment.sh "$REQUIREMENTS"
GPUS=1 # whatever the machine has: one process answers
source scripts/common.sh
exec python demo.py --runs "$OUTPUT_ROOT" --llama_model_path "$WEIGHTS" --llm_model "$MODEL" --data_root "$DATA_ROOT" "$@"
