"""The learning rate over the steps of a run, as NeMo's schedulers will compute it."""

import math

DECAYS = ("cosine", "linear", "wsd", "constant")


def warmup_steps(steps):
    """Steps of linear warm-up for a run of `steps`: a tenth, at most NeMo's own 2000, none below ten steps."""
    return min(2000, steps // 10)


def wsd_decay_steps(steps):
    """Steps of the fall at the end of a warm-up-stable-decay schedule: a fifth of the run."""
    return max(1, steps // 5)


def learning_rate(step, lr, min_lr, warmup, steps, decay="cosine", fall=None):
    """Learning rate that optimizer step `step` (from 0) of `steps` uses: linear warm-up, then `decay` to `min_lr`.

    wsd stays at `lr` until the last `fall` steps. Source: nemo/core/optim/lr_scheduler.py, NeMo 2.7.3: CosineAnnealing,
    WarmupHoldAnnealLinear (linear, wsd), WarmupPolicy (constant).
    """
    if warmup > 0 and step <= warmup:
        return lr * (step + 1) / (warmup + 1)
    if decay == "constant":
        return lr
    if step > steps:
        return min_lr
    begin = warmup if decay != "wsd" else max(warmup, steps - fall)
    if step < begin:
        return lr
    progress = (step - begin) / max(1, steps - begin)
    if decay == "cosine":
        return min_lr + (lr - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    return lr - (lr - min_lr) * progress
