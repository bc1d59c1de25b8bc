#!/usr/bin/env bash
# Installs what the tests need as scripts/environment.sh does, whose variables
# hold; lints and type-checks, then runs the tests in two processes. Arguments go
# to pytest (-n 0: in one process).
# Example:
#   bash scripts/test.sh tests/comparison -k holm
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements/test.txt
ruff check .
mypy
python -m pytest -q -n 2 --dist loadfile "$@"
