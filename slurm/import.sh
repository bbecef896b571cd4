#!/bin/bash
# Hugging Face model to NeMo checkpoint. From the repository's root: sbatch slurm/import.sh
#SBATCH --job-name=import
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=2:00:00

MODEL=meta-llama/Llama-3.1-8B-Instruct
CHECKPOINT=nemo_ckpt/Llama-3.1-8B-Instruct
PYTHON=python

exec "$PYTHON" convert_ckpt/convert_from_hf_to_nemo.py --source "$MODEL" --output_path "$CHECKPOINT"
