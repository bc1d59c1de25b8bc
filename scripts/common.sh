# Sourced by the experiment scripts: how one method is trained and scored. Set in the environment, where the defaults
# do not fit:
#   GPUS=4                    GPUs of this machine (1 where there is none)
#   DATA_ROOT=../data         ScienceQA
#   WEIGHTS=../data/weights   base models and tokenizer.model
#   MODEL=7B                  the base model
#   OUTPUT_ROOT=.             where the runs' folders go
# Under Slurm (slurm/), all nodes of the job train together, and a requeued job goes on from its last checkpoint.
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
NODES=${SLURM_NNODES:-1}
WORLD=$((GPUS * NODES))

# The published recipe: effective batch 32, on 1, 2, 4, 8 or 16 GPUs.
RECIPE=(
    --max_seq_len 512
    --batch_size 2
    --accum_iter $((16 / WORLD > 0 ? 16 / WORLD : 1))
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
    if [ "$NODES" -gt 1 ]; then
        srun --nodes "$NODES" --ntasks-per-node 1 torchrun --nnodes "$NODES" --nproc_per_node "$GPUS" \
            --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d \
            --rdzv_endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" "$@"
    elif [ "$GPUS" -gt 1 ]; then
        torchrun --standalone --nproc_per_node "$GPUS" "$@"
    else
        python "$@"
    fi
}

# train METHOD FLAG...: trains into $OUTPUT_ROOT/LaVIN-$MODEL-METHOD (or --output_dir), which $folder then names.
train() {
    local method=$1 i next
    shift
    folder="$OUTPUT_ROOT/LaVIN-$MODEL-$method"
    for ((i = 1; i < $#; i++)); do
        next=$((i + 1))
        if [ "${!i}" = --output_dir ]; then folder=${!next}; fi
    done
    if [ "${SLURM_RESTART_COUNT:-0}" -gt 0 ] && compgen -G "$folder/checkpoint-*.pth" > /dev/null; then
        set -- "$@" --resume "$folder"
    fi
    launch train.py --llm_model "$MODEL" --llama_model_path "$WEIGHTS" --data_root "$DATA_ROOT" \
        --output_dir "$folder" "${RECIPE[@]}" "$@"
}

# finetune_and_evaluate METHOD FLAG...: trains, then scores.
finetune_and_evaluate() {
    train "$@"
    launch eval.py --adapter_path "$folder" --split test
}

# instruction_tuning FLAG...: on $DATA_ROOT/all_data.json, as published for 13B.
instruction_tuning() {
    train VLIT --do_pretrain --epochs 15 --warmup_epochs 0.2 --temperature 5 "$@"
}
