# The experiment scripts source this file, scripts/common.sh, which is not run by
# itself. They read these variables, where the defaults do not fit:
#   GPUS=4                    GPUs of this machine (1 where there is none)
#   DATA_ROOT=../data         ScienceQA
#   WEIGHTS=../data/weights   base models and tokenizer.model
#   MODEL=7B                  the base model (13B in scripts that are named so)
#   OUTPUT_ROOT=.             where the runs' folders go
# The script of a method trains, then scores the run on the test split. Its
# arguments are flags of train.py (python train.py --help), and win over its own.
# Under Slurm (slurm/), all nodes of the job train together. The same command
# again goes on with an unfinished run; a finished one stays as it is. Exit status
# 75: stopped by a signal, and saved.
# Example:
#   GPUS=1 bash scripts/finetuning_sqa_7b_step.sh --epochs 5 --seed 1
[ "${BASH_SOURCE[0]}" != "$0" ] || set -- --help
source "$(dirname "${BASH_SOURCE[0]}")/help.sh"
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
[ ! -d .venv ] || export PATH="$PWD/.venv/bin:$PATH"

fail() {
    echo "$(basename "$0"): $1" >&2
    exit 1
}

source scripts/gpus.sh
VISIBLE=0
if [ -z "${LISTED:-}" ]; then # else whoever lists many runs has asked, since it takes a second
    python -c 'from importlib.util import find_spec; exit(not find_spec("torch"))' 2> /dev/null ||
        fail "no python with PyTorch here: bash scripts/environment.sh requirements.txt makes .venv with all packages"
    VISIBLE=$(visible_gpus)
fi
if [ "$VISIBLE" -eq 0 ]; then GPUS=${GPUS:-1}; fi
export GPUS=${GPUS:-4}
DATA_ROOT=${DATA_ROOT:-../data}
WEIGHTS=${WEIGHTS:-../data/weights}
MODEL=${MODEL:-7B}
OUTPUT_ROOT=${OUTPUT_ROOT:-.}
NODES=${SLURM_NNODES:-1}

WORLD=0
if [[ $GPUS =~ ^[1-9][0-9]?$ ]]; then WORLD=$((GPUS * NODES)); fi
ON_NODES=
[ "$NODES" -eq 1 ] || ON_NODES=" on each of $NODES nodes"
case $WORLD in
    1 | 2 | 4 | 8 | 16) ;;
    *) fail "GPUS=$GPUS$ON_NODES gives no effective batch of 32: choose 1, 2, 4, 8 or 16 in all" ;;
esac

[ "$VISIBLE" -eq 0 ] || [ "$GPUS" -le "$VISIBLE" ] ||
    fail "GPUS=$GPUS (4 where it is not set) is more than the visible GPUs of this node, $VISIBLE: set GPUS to at most $VISIBLE"

source scripts/signals.sh
forward_signals

# What the published recipe and a search have in common: effective batch 32, on 1, 2, 4, 8 or 16 GPUs, and the published
# loss, a mean over micro-batches of 2 samples. These are the same on any number of GPUs, and passes are larger anyway.
SETUP=(
    --max_seq_len 512
    --loss_norm microbatch
    --batch_size 2
    --accum_iter $((16 / WORLD))
    --epochs 20
    --n_prompt 6
    --prompt_format QCM-ALE
)

# The published recipe, whose hyperparameters scripts/search_space.json has as its defaults. The warm-up, 2 epochs, is
# left to train.py, which shortens it for `--epochs 1`.
RECIPE=(
    "${SETUP[@]}"
    --blr 9e-3
    --weight_decay 0.02
    --adapter_type attn
    --adapter_dim 8
    --adapter_scale 1
    --temperature 10
    --visual_adapter_type router
)

# launch PROGRAM FLAG...: on all GPUs. The port of several nodes is the job's own, since jobs may share a node. Where
# LISTED names a file, the command is written to it, for util/series, and not run.
launch() {
    local command=(python) names
    if [ -n "${LISTED:-}" ]; then # each word in single quotes, since only bash knows $'...', to which %q may come
        printf '%s\n' "$@" | LC_ALL=C sed "s/'/'\\\\''/g; s/.*/'&'/" | paste -sd " " - >> "$LISTED"
        return
    fi
    if [ "$NODES" -gt 1 ]; then
        names=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
        # srun of Slurm 22.05 to 23.02 does not take the number of CPUs from sbatch
        command=(srun --nodes "$NODES" --ntasks-per-node 1 ${SLURM_CPUS_PER_TASK:+--cpus-per-task "$SLURM_CPUS_PER_TASK"}
            python -m util.launch --nnodes "$NODES" --nproc_per_node "$GPUS"
            --rdzv_id "$SLURM_JOB_ID" --rdzv_backend c10d
            --rdzv_endpoint "${names%%$'\n'*}:$((10000 + SLURM_JOB_ID % 50000))")
        forwarded=USR1 # which srun passes on to all processes; at SIGTERM it kills them before they have saved
    elif [ "$GPUS" -gt 1 ]; then
        command=(python -m util.launch --standalone --nproc_per_node "$GPUS")
    fi
    run "${command[@]}" "$@"
}

# check_jobs: JOBS=auto is jobs_of_gpu for each GPU. Several nodes make one run at a time: they have one rendezvous.
check_jobs() {
    if [ "$JOBS" = auto ] && [ "$NODES" -gt 1 ]; then
        JOBS=1
    elif [ "$JOBS" = auto ]; then
        JOBS=$((GPUS * $(jobs_of_gpu)))
    fi
    [[ $JOBS =~ ^[1-9][0-9]{0,2}$ ]] || fail "JOBS=$JOBS: give the number of runs at once, from 1 to 999, or auto"
    [ "$NODES" -eq 1 ] || [ "$JOBS" -eq 1 ] ||
        fail "JOBS=$JOBS: $NODES nodes make one run at a time: leave JOBS out, or take one node (slurm/one_node.sbatch)"
}

# jobs_of_gpu: how many runs at once JOBS=auto gives a GPU: one; of a base below a gigabyte, which leaves a GPU idle
# most of the time, up to 8 where the node has two cores for each (docs/performance.md)
jobs_of_gpu() {
    local mebibytes most=1
    mebibytes=$(du -sLm "$WEIGHTS/$MODEL" 2> /dev/null | cut -f1) || true
    mebibytes=${mebibytes:-1024}
    # a GGUF file is dequantized to 16 bits a weight, and may have 4
    [[ $MODEL != *.gguf ]] || mebibytes=$((4 * mebibytes))
    [ "$VISIBLE" -eq 0 ] || [ "$mebibytes" -ge 1024 ] || most=$(($(nproc) / 2 / GPUS))
    echo $((most > 8 ? 8 : most < 1 ? 1 : most))
}

# take_share SLOT: job number SLOT of JOBS gets GPUs of its own, or one of them where there are more jobs than GPUs
take_share() {
    local all n
    [ "$GPUS" -gt 1 ] && [ "$JOBS" -gt 1 ] || return 0
    IFS=, read -r -a all <<< "${CUDA_VISIBLE_DEVICES:-$(seq -s, 0 $((GPUS - 1)))}"
    n=$((JOBS < GPUS ? GPUS / JOBS : 1))
    all=("${all[@]:$1 * n % GPUS:n}")
    GPUS=$n
    export CUDA_VISIBLE_DEVICES
    CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${all[*]}")
}

# in_parallel FLAG...: `work SLOT FLAG...` for each of JOBS slots. Fails with the status of one that failed.
in_parallel() {
    local slot workers=() worker status=0
    for ((slot = 0; slot < JOBS; slot++)); do
        work "$slot" "$@" &
        workers+=($!)
    done
    for worker in "${workers[@]}"; do
        while kill -0 "$worker" 2> /dev/null; do wait "$worker" || true; done # a signal ends `wait` early
        wait "$worker" || wait "$worker" || status=$? # as in `run`
    done
    return "$status"
}

# train METHOD FLAG...: trains into $OUTPUT_ROOT/LaVIN-$MODEL-METHOD, with the flags that $flags then holds.
train() {
    flags=(--llm_model "$MODEL" --llama_model_path "$WEIGHTS" --data_root "$DATA_ROOT"
        --output_dir "$OUTPUT_ROOT/LaVIN-$MODEL-$1" "${RECIPE[@]}" "${@:2}")
    launch train.py "${flags[@]}"
}

# finetune_and_evaluate METHOD FLAG...: trains, then scores.
finetune_and_evaluate() {
    train "$@"
    launch eval.py --split test --trained_with "${flags[@]}"
}

# instruction_tuning FLAG...: on $DATA_ROOT/all_data.json, as published for 13B, with micro-batches of 4.
instruction_tuning() {
    [ "$WORLD" -le 8 ] || fail "GPUS=$GPUS$ON_NODES cannot share micro-batches of 4: choose 1, 2, 4 or 8 in all"
    train VLIT --do_pretrain --batch_size 4 --accum_iter $((8 / WORLD)) --epochs 15 --warmup_epochs 0.2 \
        --temperature 5 "$@"
}
