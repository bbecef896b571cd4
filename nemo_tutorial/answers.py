"""In fine-tuning, logits of the tokens alone that have a loss: not of prompts, and not of padding.

Ours, because NeMo and Megatron make the logits of all tokens and multiply their losses by a mask of zeros and ones.
The output layer is a fifth of a model of 1B: benchmarks/README.md. s tokens of b samples, t = s b.
"""

import torch
from lightning.pytorch import Callback
from megatron.core.models.gpt import GPTModel
from nemo.collections import llm

from nemo_tutorial import compat

STOCK_DATA, STOCK_FORWARD = llm.GPTModel.data_step, llm.GPTModel.forward_step
STOCK_POST = getattr(GPTModel, "_postprocess", None)  # not in an older Megatron
_chosen = None  # of the micro batch that is in its forward pass: (indices into its t tokens, how many of them count)


class LogitsOfAnswers(Callback):
    """Have all of NeMo's GPT models of the process make those alone."""

    def setup(self, trainer, pl_module, stage):
        wanted = {"hidden_states": 0, "labels": 0, "mtp_in_postprocess": 0}
        if STOCK_POST and compat.supported(STOCK_POST, **wanted) == wanted:
            llm.GPTModel.data_step, llm.GPTModel.forward_step = data_step, forward_step
            GPTModel._postprocess = postprocess


def data_step(self, batches):
    """NeMo's GPTModel's, which moves a micro batch to the GPU; which tokens count is looked up before."""
    batch = next(batches)
    moved = STOCK_DATA(self, iter([batch]))
    mask = (batch[0] if isinstance(batch, tuple) else batch).get("loss_mask")
    labels = moved.get("labels")  # only on the last stage of a pipeline
    # A step whose host would ask the GPU how many count would wait for it.
    if labels is not None and mask is not None and mask.shape == labels.shape and mask.device.type == "cpu":
        moved["chosen"] = chosen(mask, labels.device)
    return moved


def chosen(mask, device):
    """(indices into the t tokens, of which Megatron has a token of all samples side by side; how many of them count).

    mask (b, s) on the host. There are a few more indices than count, so that few sizes of logits occur: each new one
    costs memory. None where that leaves nothing to spare.
    """
    places = mask.t().reshape(-1).nonzero().view(-1)
    count, tokens = len(places), mask.numel()
    step = 128 * -(-tokens // 4096)
    size = step * max(1, -(-count // step))
    if size >= tokens:
        return None
    padded = torch.zeros(size, dtype=torch.long, pin_memory=device.type == "cuda")
    padded[:count] = places
    return padded.to(device, non_blocking=True), count


def forward_step(self, batch):
    """NeMo's GPTModel's, of a micro batch of ours."""
    global _chosen
    _chosen = batch.pop("chosen", None)
    try:
        return STOCK_FORWARD(self, batch)
    finally:
        _chosen = None


def postprocess(self, **inputs):
    """Megatron's GPTModel's `_postprocess`: hidden states (s, b, h), labels (b, s) -> losses (b, s), the others 0."""
    hidden, labels = inputs["hidden_states"], inputs["labels"]
    if (
        _chosen is None
        or not self.post_process
        or labels is None
        or inputs.get("mtp_in_postprocess")  # of which each head has other labels
        or hidden.shape[:2] != labels.t().shape  # split between GPUs
    ):
        return STOCK_POST(self, **inputs)
    places, count = _chosen
    inputs["hidden_states"] = Rows.apply(hidden, places, count)
    inputs["labels"] = labels.t().reshape(1, -1)[:, places]
    losses = STOCK_POST(self, **inputs)[0, :count]
    every = losses.new_zeros(labels.numel()).index_copy(0, places[:count], losses)
    return every.view(hidden.shape[:2]).t().contiguous()


class Rows(torch.autograd.Function):
    """hidden (s, b, h) -> (n, 1, h), the n of its t rows at `places`, of which the first `count` have a gradient."""

    @staticmethod
    def forward(ctx, hidden, places, count):
        ctx.save_for_backward(places[:count])
        ctx.shape = hidden.shape
        return hidden.flatten(0, 1).index_select(0, places)[:, None]

    @staticmethod
    def backward(ctx, grad):
        (places,) = ctx.saved_tensors
        whole = grad.new_zeros(ctx.shape)
        whole.view(-1, ctx.shape[-1]).index_copy_(0, places, grad[: len(places), 0])
        return whole, None, None
