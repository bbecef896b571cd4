"""The host gives the GPU a step before it has ended the one before: what it waits for in each step stays on the GPU.

Each function here takes the place of one of Megatron's, NeMo's or Lightning's and does the same, but theirs fetches a
number from the GPU, for which the host waits, and after that the GPU for the host. benchmarks/README.md has its worth.
"""

import torch
from lightning.pytorch import Callback
from megatron.core import parallel_state
from megatron.core.distributed import param_and_grad_buffer
from megatron.core.optimizer import clip_grads
from megatron.core.optimizer import optimizer as megatron_optimizer
from nemo.lightning.megatron_parallel import MaskedTokenLossReduction

from nemo_tutorial import compat, progress

STOCK_NORM, STOCK_CLIP = megatron_optimizer.get_grad_norm_fp32, megatron_optimizer.clip_grad_by_total_norm_fp32
Buckets = getattr(param_and_grad_buffer, "_ParamAndGradBucketGroup", None)  # not in an older Megatron
STOCK_CHECK, STOCK_REDUCE = getattr(Buckets, "check_grads", None), MaskedTokenLossReduction.reduce
_norms = []  # of the buckets of this rank's own gradients, in the step that goes on


class RunAhead(Callback):
    """Puts them in their places, and writes what Lightning logs of a step after the next one."""

    def setup(self, trainer, pl_module, stage):
        if compat.replace(megatron_optimizer, "clip_grad_by_total_norm_fp32", clip):  # which takes either kind of norm
            compat.replace(megatron_optimizer, "get_grad_norm_fp32", gradient_norm)
        # A rank alone has one norm: that for clipping, which callbacks.LossGuard looks at as well.
        alone = trainer.world_size == 1 and pl_module.optim.config.clip_grad > 0
        compat.replace(Buckets, "check_grads", leave_to_clipping if alone else keep_norms)
        compat.replace(MaskedTokenLossReduction, "reduce", reduced_loss)
        self.waiting, connector = None, trainer._logger_connector
        stock = connector.log_metrics

        def log_metrics(metrics, step=None):
            self._write(trainer)
            if not trainer.training:
                stock(metrics, step)
            elif trainer.loggers and metrics:
                connector._logged_metrics.update(metrics)
                place = {"step": trainer.fit_loop.epoch_loop._batches_that_stepped, "epoch": trainer.current_epoch}
                self.waiting = progress.Numbers(place | metrics)

        connector.log_metrics = log_metrics

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        _norms.clear()

    def on_validation_start(self, trainer, pl_module):
        self._write(trainer)

    def on_train_end(self, trainer, pl_module):
        self._write(trainer)

    def on_exception(self, trainer, pl_module, exception):
        if isinstance(exception, SystemExit):  # else the GPU may never answer
            self._write(trainer)

    def _write(self, trainer):
        if self.waiting:
            numbers, self.waiting = self.waiting.get(), None
            step = int(numbers.pop("step"))
            for logger in trainer.loggers:
                logger.log_metrics(metrics=numbers, step=step)
                logger.save()


def gradient_norm(grads_for_norm, norm_type=2, grad_stats_parallel_group=None):
    """Megatron's get_grad_norm_fp32; returns a tensor of float64 instead of a number."""
    on_gpu = all(type(grad) is torch.Tensor and grad.is_cuda for grad in grads_for_norm)
    if norm_type != 2 or not grads_for_norm or not on_gpu:
        return STOCK_NORM(grads_for_norm, norm_type, grad_stats_parallel_group)
    return _norm(grads_for_norm, grad_stats_parallel_group)


def _norm(grads, group):
    overflow = torch.zeros(1, dtype=torch.int, device=grads[0].device)
    norm, _ = clip_grads.multi_tensor_applier(clip_grads.l2_norm_impl, overflow, [grads], False)
    squared = norm**2
    torch.distributed.all_reduce(squared, group=group)
    return squared.double().sqrt().reshape(())


def clip(parameters, max_norm, total_norm, use_decoupled_grad=False):
    """Megatron's clip_grad_by_total_norm_fp32, by a factor that may be 1."""
    parameters = [parameters] if torch.is_tensor(parameters) else list(parameters)
    grads = [getattr(p, "decoupled_grad" if use_decoupled_grad else "grad", None) for p in parameters]
    grads = [grad for grad in grads if grad is not None]
    if torch.is_tensor(total_norm) and all(grad.dtype == torch.float32 for grad in grads):
        factor = (max_norm / (total_norm + 1e-6)).clamp(max=1).float()
        if grads:
            torch._foreach_mul_([grad.detach() for grad in grads], factor)
    else:  # gradients in bf16 would be multiplied by a factor in bf16
        STOCK_CLIP(parameters, max_norm, float(total_norm), use_decoupled_grad)


def keep_norms(self, check_for_nan_or_inf, check_for_large):
    """_ParamAndGradBucketGroup's check_grads: callbacks.LossGuard looks at the norms, before anything is saved."""
    if check_for_large:
        STOCK_CHECK(self, check_for_nan_or_inf, check_for_large)
    elif check_for_nan_or_inf:
        _norms.extend(bucket.grad_data.norm(p=2) for bucket in self.buckets)


def leave_to_clipping(self, check_for_nan_or_inf, check_for_large):
    """_ParamAndGradBucketGroup's check_grads, where the norm of the same gradients is looked at in any case."""
    if check_for_large:
        STOCK_CHECK(self, check_for_nan_or_inf, check_for_large)


def own_gradients():
    """{name: the sum of the norms of this rank's own gradients in the step that ends}, if they are looked at."""
    return {"own_gradients": torch.stack([norm.float() for norm in _norms]).sum()} if _norms else {}


def reduced_loss(self, losses_reduced_per_micro_batch):
    """MaskedTokenLossReduction's reduce: the mean loss of all tokens of all micro batches and replicas that count."""
    found = losses_reduced_per_micro_batch
    if not found or "avg" in found[0]:
        return STOCK_REDUCE(self, found)
    rows = torch.vstack([each["loss_sum_and_ub_size"] for each in found])
    total = rows.where(rows[:, 1:] > 0, 0).sum(dim=0)
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return total[0] / total[1]
