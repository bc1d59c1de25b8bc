#!/usr/bin/env bash
# Instruction tuning of Vicuna 13B, whose full weights, in Hugging Face's layout
# or Meta's, lie in WEIGHTS/vicuna_13B; else as vl_instruction_tuning_13b.sh.
#   MODEL=vicuna_13B          the base model, in place of 13B
# Example:
#   GPUS=8 bash scripts/vl_instruction_tuning_vicuna_13b.sh
MODEL=${MODEL:-vicuna_13B}
source "$(dirname "$0")/common.sh"
instruction_tuning "$@"
