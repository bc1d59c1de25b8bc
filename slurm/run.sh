# The job files source this file, which is not run by itself, in the project's
# folder: it runs the script that their arguments name. 120 s before the time
# limit, Slurm sends SIGUSR1 to the job file alone (#SBATCH --signal). The script
# then saves, and goes on in the requeued job.
[ "${BASH_SOURCE[0]}" != "$0" ] || source "$(dirname "$0")/../scripts/help.sh" --help
source scripts/signals.sh
forward_signals
if [ $# -eq 0 ]; then
    echo "name a script: sbatch slurm/one_node.sbatch scripts/finetuning_sqa_7b.sh" >&2
    exit 1
fi
export GPUS=${GPUS:-${SLURM_GPUS_ON_NODE:-4}}
# a task of an array by its own name: one of them has the number of the whole array as SLURM_JOB_ID
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_}${SLURM_ARRAY_TASK_ID:-$SLURM_JOB_ID}
status=0
run bash "$@" || status=$?
if [ "$stopped" = USR1 ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$job" 2> /dev/null || echo "submit the same command again to go on"
fi
exit "$status"
