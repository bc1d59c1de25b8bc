#!/usr/bin/env bash
# Dropout that rises with depth, by 1% a layer.
source "$(dirname "$0")/common.sh"
finetune_and_evaluate drop_inc \
    --lr_schedule cosine --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1.01 --dropout_lim 0.2 \
    "$@"
