#!/usr/bin/env bash
# LaVIN-lite: the base method for 13B on 4-bit weights
# (pip install -r requirements/lite.txt). On a small card, add
# --gradient_checkpointing: less memory, slower.
MODEL=${MODEL:-13B}
source "$(dirname "$0")/common.sh"
finetune_and_evaluate lite \
    --temperature 5 --bits 4bit \
    --lr_schedule cosine --min_lr 0 \
    --dropout_prob 0.1 --dropout_var 1 --dropout_lim 0.2 \
    "$@"
