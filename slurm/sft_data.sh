#!/bin/bash
# Instruction data, split into training, validation and test. From the repository's root: sbatch slurm/sft_data.sh
#SBATCH --job-name=sft-data
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=4
#SBATCH --mem=16G
#SBATCH --time=1:00:00

DATASET=yahma/alpaca-cleaned
DATA=data/alpaca
PYTHON=python

exec "$PYTHON" finetuning/download_split_data.py --dataset "$DATASET" --output_path "$DATA"
