#!/usr/bin/env bash
# Dropout that falls with depth, by 3% a layer.
source "$(dirname "$0")/common.sh"
finetune_and_evaluate drop_dec_v2 \
    --lr_schedule cosine --min_lr 0 \
    --dropout_prob 0.2 --dropout_var 0.97 --dropout_lim 0.1 \
    "$@"
