#!/bin/bash
# Text to tokens, for pretraining. From the repository's root: sbatch slurm/preprocess.sh
#SBATCH --job-name=preprocess
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=16
#SBATCH --mem=32G
#SBATCH --time=8:00:00

TEXT=data/custom_dataset/json/wikinews-zhtw.jsonl
MODEL=meta-llama/Llama-3.1-8B-Instruct
PREFIX=data/custom_dataset/preprocessed/wikinews
PYTHON=python

exec "$PYTHON" data/preprocess_data_for_megatron.py --input "$TEXT" --tokenizer_type "$MODEL" \
    --output_prefix "$PREFIX" --append_eod
