#!/bin/bash
# Pretraining: this job of one CPU submits the one with the GPUs, and waits for it.
# From the repository's root: sbatch slurm/pretrain.sh, or without waiting: bash slurm/pretrain.sh
#SBATCH --job-name=submit-pretraining
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=1
#SBATCH --mem=8G
#SBATCH --time=7-00:00:00

EXPERIMENT=llama31_pretraining
CHECKPOINT=nemo_ckpt/Llama-3.1-8B-Instruct
DATA=data/custom_dataset/preprocessed
NODES=2
GPUS=8
TP=2
STEPS=100
BATCH=2048
TIME=1-00:00:00
MORE=() # further flags, like --container_image /images/nemo.sqsh --partition gpus
PYTHON=python

exec "$PYTHON" pretraining/pretrain.py --executor slurm --wait --experiment "$EXPERIMENT" --time "$TIME" \
    --num_nodes "$NODES" --num_gpus "$GPUS" --tensor_model_parallel_size "$TP" \
    --nemo_model "$CHECKPOINT" --dataset_path "$DATA" --max_steps "$STEPS" --global_batch_size "$BATCH" "${MORE[@]}"
