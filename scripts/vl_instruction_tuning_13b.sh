#!/usr/bin/env bash
# Instruction tuning of 13B on Alpaca and LLaVA-Instruct, as published on 8 GPUs.
# First make DATA_ROOT/all_data.json (python -m tools.data_processing). Talk to
# the run with scripts/demo.sh, score it with scripts/eval_mme_benchmark.sh.
# Example:
#   GPUS=8 bash scripts/vl_instruction_tuning_13b.sh
MODEL=${MODEL:-13B}
source "$(dirname "$0")/common.sh"
instruction_tuning "$@"
