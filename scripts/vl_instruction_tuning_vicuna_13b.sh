#!/usr/bin/env bash
# Instruction tuning of Vicuna 13B, whose weights in Meta's layout (params.json, consolidated.*.pth) lie in
# WEIGHTS/vicuna_13B; else as vl_instruction_tuning_13b.sh.
MODEL=${MODEL:-vicuna_13B}
source "$(dirname "$0")/common.sh"
instruction_tuning "$@"
