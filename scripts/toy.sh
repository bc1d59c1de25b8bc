# Sourced, and not run by itself: mini ScienceQA and a toy base, made once, and
# what the experiment scripts need to run on them. Leaves the flags in $FLAGS.
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "$0")/help.sh" --help
export DATA_ROOT=data/mini WEIGHTS=weights MODEL=toy GPUS=1
source scripts/signals.sh
forward_signals
trap go_on_later EXIT
# what is looked for is written last
[ -f "$DATA_ROOT/problems.json" ] || run python -m tools.make_mini_scienceqa --out "$DATA_ROOT"
# another number of threads makes another base, as another kind of CPU may
[ -f "$WEIGHTS/$MODEL/consolidated.00.pth" ] ||
    OMP_NUM_THREADS=2 run python -m tools.make_toy_base --data_root "$DATA_ROOT" --out "$WEIGHTS/$MODEL"
FLAGS=(--vision_model "$WEIGHTS/$MODEL/vit" --device cpu --batch_size 8 --accum_iter 1 --epochs 2 --warmup_epochs 0.3)
# so small a model gains little from a second thread: two runs at once take two thirds of the time
export JOBS=2 OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
