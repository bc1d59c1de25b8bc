#!/usr/bin/env bash
# Base: cosine schedule, the same dropout in every layer.
source "$(dirname "$0")/common.sh"
finetune_and_evaluate base \
    --lr_schedule cosine --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
