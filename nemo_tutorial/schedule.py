"""The learning rate over the steps of a run, as NeMo's CosineAnnealingScheduler will compute it."""

import math


def warmup_steps(steps):
    """Steps of linear warm-up for a run of `steps`: a tenth, at most NeMo's own 2000, none below ten steps."""
    return min(2000, steps // 10)


def learning_rate(step, lr, min_lr, warmup, decay_steps):
    """Learning rate that optimizer step `step` (from 0) uses: linear warm-up, then a cosine down to `min_lr`.

    Source: nemo/core/optim/lr_scheduler.py, WarmupPolicy and CosineAnnealing, NeMo 2.7.3.
    """
    if warmup > 0 and step <= warmup:
        return lr * (step + 1) / (warmup + 1)
    if step > decay_steps:
        return min_lr
    progress = (step - warmup) / max(1, decay_steps - warmup)
    return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
