#!/usr/bin/env bash
# Installs what the tests need and runs them in two processes; arguments go to pytest (-n 0: in one).
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements-test.txt
python -m pytest -q -n 2 --dist loadfile "$@"
