#!/usr/bin/env bash
# The base method on Vicuna 13B, whose v0 delta lies in
# WEIGHTS/vicuna_13B, or MODEL names full weights.
MODEL=${MODEL:-13B}
source "$(dirname "$0")/common.sh"
finetune_and_evaluate vicuna \
    --temperature 5 --use_vicuna \
    --lr_schedule cosine --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
