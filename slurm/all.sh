#!/bin/bash
# The whole tutorial, each stage after those that it needs. From the repository's root: bash slurm/all.sh
set -e

import=$(sbatch --parsable slurm/import.sh)
preprocess=$(sbatch --parsable slurm/preprocess.sh)
sft_data=$(sbatch --parsable slurm/sft_data.sh)
pretrain=$(sbatch --parsable --dependency="afterok:$import:$preprocess" slurm/pretrain.sh)
finetune=$(sbatch --parsable --dependency="afterok:$pretrain:$sft_data" slurm/finetune.sh)
export=$(sbatch --parsable --dependency="afterok:$finetune" slurm/export.sh)
echo "submitted: import $import, preprocess $preprocess, SFT data $sft_data, pretraining $pretrain," \
    "finetuning $finetune, export $export"
