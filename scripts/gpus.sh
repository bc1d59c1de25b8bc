# Sourced, and not run by itself: tells how many GPUs there are. That the program
# nvidia-smi is there says nothing: a login node may have it, and no GPU.
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "$0")/help.sh" --help

# visible_gpus: the number of GPUs that this job may use on this node; 0 where nvidia-smi finds none, or where
# CUDA_VISIBLE_DEVICES hides them all (it is empty, -1, or NoDevFiles by Slurm)
visible_gpus() {
    local visible
    visible=$(nvidia-smi -L 2> /dev/null | grep -c '^GPU ') || true
    if [ "${visible:-0}" -gt 0 ] && [ -n "${CUDA_VISIBLE_DEVICES+given}" ]; then
        visible=$(tr , '\n' <<< "$CUDA_VISIBLE_DEVICES" | grep -cE '^ *([0-9]|GPU-|MIG-)') || true
    fi
    echo "${visible:-0}"
}
