#!/usr/bin/env bash
# Says what this machine has, what a run would use, and what would fail, with the
# fix: as text for a bug report. Arguments are flags of train.py. Exit status 0:
# nothing was found that would stop a run. Nothing needs to be installed.
#   DATA_ROOT, WEIGHTS, MODEL, OUTPUT_ROOT
#                             as the experiment scripts read them; flags win
#   PYTHON=python3            the Python to take where there is no .venv
# Example:
#   MODEL=13B bash scripts/check.sh --bits 4bit
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -c '' 2> /dev/null || python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.10 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 10) else None'
exec "$python" -m tools.doctor ${DATA_ROOT:+--data_root "$DATA_ROOT"} ${WEIGHTS:+--llama_model_path "$WEIGHTS"} \
    ${MODEL:+--llm_model "$MODEL"} ${OUTPUT_ROOT:+--output_dir "$OUTPUT_ROOT"} "$@"
