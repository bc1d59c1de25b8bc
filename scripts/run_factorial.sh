#!/usr/bin/env bash
# Trains every schedule with every dropout, so that plots/effects.png shows main
# effects and interactions. The entries are methods of scripts/methods.json, or
# flags such as dropout_prob=0.158; the first of each list is the base's. The two
# constant dropouts are controls: each is the mean over LLaMA's layers of the
# varying dropout before it. SEEDS, JOBS, arguments and the other variables are
# those of scripts/run_all_variants.sh.
#   SCHEDULES                 by default: base cyclical step exponential
#   DROPOUTS                  by default: base drop_inc_v2 dropout_prob=0.158
#                             drop_dec_v2 dropout_prob=0.133
# Example:
#   SEEDS="0 1 2" SCHEDULES="base step" DROPOUTS="base drop_dec_v2" \
#       bash scripts/run_factorial.sh
source "$(dirname "$0")/help.sh"
set -euo pipefail
SCHEDULES=${SCHEDULES:-base cyclical step exponential}
DROPOUTS=${DROPOUTS:-base drop_inc_v2 dropout_prob=0.158 drop_dec_v2 dropout_prob=0.133}
METHODS=
for schedule in $SCHEDULES; do
    for dropout in $DROPOUTS; do METHODS+=" $schedule+$dropout"; done
done
METHODS=${METHODS//+base/} exec bash "$(dirname "$0")/run_all_variants.sh" "$@"
