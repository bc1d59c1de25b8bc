#!/usr/bin/env bash
# Says what this machine has, what a run would use, and what would fail, with the
# fix: as text for a bug report. Arguments are flags of train.py. Exit status 0:
# nothing was found that would stop a run. Nothing needs to be installed.
#   PYTHON=python3            the Python to take where there is no .venv
# Example:
#   bash scripts/check.sh --data_root ../data --llm_model 7B
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
"$python" -c '' 2> /dev/null || python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit("Python 3.10 or newer is needed; name one with PYTHON=...") if sys.version_info < (3, 10) else None'
exec "$python" -m tools.doctor "$@"
