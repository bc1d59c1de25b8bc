#!/usr/bin/env bash
# From a clone to a hyperparameter search with its report, on a CPU: ten trials of
# the toy base, the best one and the base again with fresh seeds. What exists is
# used again; results go to runs/search. Arguments are flags of search.py.
# Installs what is missing as scripts/environment.sh does, whose variables hold.
# Example:
#   bash scripts/search_quickstart.sh --trials 20
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements/search.txt
source scripts/toy.sh
export STUDY=runs/search
exec bash scripts/search_sqa_7b.sh --space scripts/search_quickstart.json --trials 10 --questions 60 --confirm 1 \
    --seeds 2 "$@" -- "${FLAGS[@]}"
