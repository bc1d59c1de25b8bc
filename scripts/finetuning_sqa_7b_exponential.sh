#!/usr/bin/env bash
# Exponential decay of the learning rate to 1e-5.
source "$(dirname "$0")/common.sh"
finetune_and_evaluate exponential \
    --lr_schedule exponential --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
