#!/usr/bin/env bash
# Step decay: the learning rate falls to 0.65 of itself every two epochs.
source "$(dirname "$0")/common.sh"
finetune_and_evaluate step \
    --lr_schedule step --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
