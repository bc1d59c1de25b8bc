#!/usr/bin/env bash
# Talk to finished runs in the browser (--cli: in the terminal): those of quickstart.sh, or, with the environment of
# scripts/common.sh, any others: MODEL=7B OUTPUT_ROOT=. bash scripts/demo.sh. Arguments go to demo.py.
set -euo pipefail
cd "$(dirname "$0")/.."
export MODEL=${MODEL:-toy}
if [ "$MODEL" = toy ]; then
    export DATA_ROOT=${DATA_ROOT:-data/mini} WEIGHTS=${WEIGHTS:-weights} OUTPUT_ROOT=${OUTPUT_ROOT:-runs/quickstart}
fi
source scripts/common.sh
if [[ " $* " != *" --runs"[\ =]* && " $* " != *" --adapter_path"[\ =]* ]] && # which name others
    ! compgen -G "$OUTPUT_ROOT/*/checkpoint-*.pth" > /dev/null && ! compgen -G "$OUTPUT_ROOT/checkpoint-*.pth" > /dev/null; then
    echo "no finished runs in $OUTPUT_ROOT: run 'bash scripts/quickstart.sh' first, or name others with OUTPUT_ROOT and MODEL" >&2
    exit 1
fi
source scripts/environment.sh requirements-demo.txt
exec python demo.py --runs "$OUTPUT_ROOT" --llama_model_path "$WEIGHTS" --llm_model "$MODEL" --data_root "$DATA_ROOT" "$@"
