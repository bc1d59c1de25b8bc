#!/usr/bin/env bash
# The base method for 13B.
MODEL=${MODEL:-13B}
source "$(dirname "$0")/common.sh"
finetune_and_evaluate base \
    --temperature 5 \
    --lr_schedule cosine --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
