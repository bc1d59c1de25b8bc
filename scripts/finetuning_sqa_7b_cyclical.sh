#!/usr/bin/env bash
# Cyclical learning rate: triangles whose height halves; no warm-up.
source "$(dirname "$0")/common.sh"
finetune_and_evaluate cyclical \
    --lr_schedule cyclical --min_lr 5e-5 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
