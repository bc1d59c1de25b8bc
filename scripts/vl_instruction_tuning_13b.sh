#!/usr/bin/env bash
# Instruction tuning of 13B on Alpaca and LLaVA-Instruct: first make DATA_ROOT/all_data.json (python -m tools.data_processing).
# As published on 8 GPUs; talk to it with MODEL=13B bash scripts/demo.sh, score it with scripts/eval_mme_benchmark.sh.
MODEL=${MODEL:-13B}
source "$(dirname "$0")/common.sh"
instruction_tuning "$@"
