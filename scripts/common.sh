# Sourced by the experiment scripts: how one method is trained and scored. Set in the environment, where the defaults
# do not fit:
#   GPUS=4                    GPUs of this machine (1 where there is none)
#   DATA_ROOT=../data         ScienceQA
#   WEIGHTS=../data/weights   base models and tokenizer.model
#   MODEL=7B                  the base model
#   OUTPUT_ROOT=.             where the runs' folders go
# A script's arguments are added to its flags, and win: bash scripts/finetuning_sqa_7b_step.sh --epochs 5 --seed 1
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"

if ! command -v nvidia-smi > /dev/null; then GPUS=${GPUS:-1}; fi
GPUS=${GPUS:-4}
DATA_ROOT=${DATA_ROOT:-../data}
WEIGHTS=${WEIGHTS:-../data/weights}
MODEL=${MODEL:-7B}
OUTPUT_ROOT=${OUTPUT_ROOT:-.}

# The published recipe: effective batch 32, whatever the number of GPUs.
RECIPE=(
    --max_seq_len 512
    --batch_size 2
    --accum_iter $((16 / GPUS > 0 ? 16 / GPUS : 1))
    --epochs 20
    --warmup_epochs 2
    --blr 9e-3
    --weight_decay 0.02
    --adapter_type attn
    --adapter_dim 8
    --adapter_scale 1
    --n_prompt 6
    --prompt_format QCM-ALE
    --temperature 10
    --visual_adapter_type router
)

launch() {
    if [ "$GPUS" -gt 1 ]; then torchrun --standalone --nproc_per_node "$GPUS" "$@"; else python "$@"; fi
}

# finetune_and_evaluate METHOD FLAG...: trains into $OUTPUT_ROOT/LaVIN-$MODEL-METHOD (or --output_dir), then scores.
finetune_and_evaluate() {
    local method=$1 folder i
    shift
    folder="$OUTPUT_ROOT/LaVIN-$MODEL-$method"
    for ((i = 1; i < $#; i++)); do
        if [ "${!i}" = --output_dir ]; then local next=$((i + 1)); folder=${!next}; fi
    done
    launch train.py --llm_model "$MODEL" --llama_model_path "$WEIGHTS" --data_root "$DATA_ROOT" \
        --output_dir "$folder" "${RECIPE[@]}" "$@"
    launch eval.py --adapter_path "$folder" --split test
}
