#!/bin/bash
# The newest checkpoint of a run to a Hugging Face model. From the repository's root: sbatch slurm/export.sh
#SBATCH --job-name=export
#SBATCH --output=%x-%j.log
#SBATCH --cpus-per-task=8
#SBATCH --mem=64G
#SBATCH --time=2:00:00

CHECKPOINTS=results/llama31_finetuning/checkpoints
MODEL=hf_ckpt
PYTHON=python

newest=$(find "$CHECKPOINTS" -name '*-last' -printf '%T@ %p\n' | sort -n | tail -n 1 | cut -d ' ' -f 2-)
exec "$PYTHON" convert_ckpt/convert_from_nemo_to_hf.py --source "$newest" --output_path "$MODEL"
