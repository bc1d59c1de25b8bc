# Sourced by the job scripts, in the project's folder: runs the script that their arguments name. 120 s before the time
# limit, Slurm sends SIGUSR1 to the job script alone (#SBATCH --signal); what is saved then goes on in the requeued job.
source scripts/signals.sh
forward_signals
if [ $# -eq 0 ]; then
    echo "name a script: sbatch slurm/one_node.sbatch scripts/finetuning_sqa_7b.sh" >&2
    exit 1
fi
export GPUS=${GPUS:-4}
status=0
run bash "$@" || status=$?
if [ "$stopped" = USR1 ] && [ "$status" -ne 0 ]; then
    scontrol requeue "$SLURM_JOB_ID" 2> /dev/null || echo "submit the same command again to go on"
fi
exit "$status"
