#!/bin/bash
# Instruction tuning: this job of one CPU submits the one with the GPUs, and waits for it.
# From the repository's root: sbatch slurm/finetune.sh, or without waiting: bash slurm/finetune.sh
#SBATCH --job-name=submit-finetuning
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=1
#SBATCH --mem=8G
#SBATCH --time=7-00:00:00

EXPERIMENT=llama31_finetuning
DATA=data/alpaca
NODES=2
GPUS=8
TP=2
STEPS=100
BATCH=128
TIME=1-00:00:00
MORE=() # further flags, like --container_image /images/nemo.sqsh --peft lora
PYTHON=python

# Without --nemo_model: from the newest pretraining checkpoint.
exec "$PYTHON" finetuning/finetune.py --executor slurm --wait --experiment "$EXPERIMENT" --time "$TIME" \
    --num_nodes "$NODES" --num_gpus "$GPUS" --tensor_model_parallel_size "$TP" \
    --nemo_model --dataset_path "$DATA" --max_steps "$STEPS" --global_batch_size "$BATCH" "${MORE[@]}"
