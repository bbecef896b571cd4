#!/bin/bash
# pretraining, 16 x 8, written by --executor slurm
# Edit it if you like, and submit it: sbatch WORK/results/golden/slurm/script.sh
# Tokens are not in here: the job inherits HF_TOKEN and WANDB_API_KEY from where sbatch is called.
#SBATCH --job-name=golden
#SBATCH --output=WORK/results/golden/slurm/%j.log
#SBATCH --open-mode=append
#SBATCH --chdir=WORK
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=8
#SBATCH --time=1-00:00:00
#SBATCH --account=lab
#SBATCH --partition=gpus
#SBATCH --mem=0
#SBATCH --gres=gpu:8
#SBATCH --exclusive
#SBATCH --signal=B:USR1@600
#SBATCH --requeue
#SBATCH --export=ALL

run=WORK/results/golden
save_before=600 # seconds that a checkpoint may take; as in --signal above
requeue=yes

umask 0022
export PYTHONPATH="$run/slurm/code${PYTHONPATH:+:$PYTHONPATH}"
export TOKENIZERS_PARALLELISM=false
export TORCHELASTIC_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=1800
export TORCH_NCCL_AVOID_RECORD_STREAMS=1
export NCCL_NVLS_ENABLE=0
export CUDA_DEVICE_MAX_CONNECTIONS=1

# One line for every start and end; "done" and "failed" end a chain.
say() {
    printf '%s job %s.%s %s\n' "$(date +%FT%T)" "$SLURM_JOB_ID" "${SLURM_RESTART_COUNT:-0}" "$*" |
        tee -a "$run/slurm/history.txt"
}

# A later job of a chain (sbatch --dependency=afterany:JOB WORK/results/golden/slurm/script.sh chained) goes on where one was stopped.
if [ "${1:-}" = chained ]; then
    case "$(tail -n 1 "$run/slurm/history.txt")" in
    *" done") exit 0 ;;
    *" failed"*)
        echo "the job before failed: nothing is done here"
        exit 1
        ;;
    esac
fi

first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_ADDR=$(scontrol show node "$first" | sed -n 's/.*NodeAddr=\([^ ]*\).*/\1/p')
export MASTER_ADDR="${MASTER_ADDR:-$first}"
export MASTER_PORT=$((20000 + (SLURM_JOB_ID * 4 + ${SLURM_RESTART_COUNT:-0} % 4) % 20000))
# Since Slurm 22.05 srun does not take over the job's; without, a rank and its loaders would share one core.
cpus=$((SLURM_CPUS_ON_NODE / 8))
export SRUN_CPUS_PER_TASK=$((cpus > 0 ? cpus : 1))

marker=$run/record/preempted.json
before=$(cat "$marker" 2>/dev/null)
rm -f "$marker" "$run/record/failure.json"

# Ahead of the time limit, or by `scancel --signal=USR1 --batch`: the ranks save and stop. Slurm asks this shell only,
# and srun passes it on to every rank.
asked=no
# shellcheck disable=SC2317 # called by trap
warned() {
    again=yes
    end=$(scontrol show job "$SLURM_JOB_ID" | sed -n 's/.*EndTime=\([^ ]*\).*/\1/p')
    left=$(($(date -d "$end" +%s 2>/dev/null || echo 9999999999) - $(date +%s)))
    asked=limit
    [ "$left" -gt $((save_before + 120)) ] && asked=person
    say "warned by USR1, $asked"
    kill -USR1 "$ranks" 2>/dev/null
}
# shellcheck disable=SC2317
stopped() {
    again=yes
    asked=cancelled
}
trap warned USR1
trap stopped TERM

say started on "$SLURM_JOB_NODELIST"
srun --label --kill-on-bad-exit=1 --wait=60 \
    apptainer exec --nv \
    --bind WORK:WORK \
    --bind ROOT:ROOT \
    --pwd WORK \
    /images/nemo.sif \
    python "$run/slurm/code/nemo_tutorial/rank.py" "$run/slurm/recipe" --check_network &
ranks=$!
again=yes
while [ "$again" = yes ]; do # a signal ends a wait early
    again=no
    wait "$ranks"
    code=$?
done

if [ -s "$marker" ]; then
    say "stopped with a checkpoint: $(cat "$marker")"
    if [ "$asked" = limit ] && [ "$requeue" = yes ]; then
        if [ "$(cat "$marker")" = "$before" ]; then
            say "failed: no step between two time limits"
            exit 1
        fi
        say requeued
        scontrol requeue "$SLURM_JOB_ID" || say "not requeued; submit it again"
    fi
    exit 143
fi
if [ "$code" -eq 0 ]; then
    say "done"
    exit 0
elif [ "$asked" = cancelled ]; then
    say "cancelled; the last complete checkpoint is whole"
else
    say "failed: srun's exit code is $code" # that of the first rank, or of one that was ended because of it
fi
exit 1
