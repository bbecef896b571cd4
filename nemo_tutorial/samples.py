"""What the model in training says to the same prompts at each validation. Runs in the ranks; questions.py has the rest.

Greedy, by the model as it stands in the ranks, through Megatron's own pipeline: with tensor, pipeline, sequence and
expert parallelism, and without a second copy of the weights. Each token is a forward pass of a prompt with what was
said to it so far, so it costs prompts x --generate_tokens passes; nothing is kept between them.
"""

import json
import math
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback

from nemo_tutorial import callbacks, metrics


class Samples(Callback):
    """At each validation, before the first step too, append {"step", "seconds", "replies"} to samples.jsonl.

    `record` is the folder of prompts.json, which questions.asked has made. A reply has "prompt", "reply", and "ended":
    whether it stopped by an end token before `tokens` were said.
    """

    def __init__(self, record, tokens):
        self.record, self.tokens = record, tokens

    def on_validation_end(self, trainer, pl_module):
        asked = json.loads((Path(self.record) / "prompts.json").read_text(encoding="utf-8"))
        began, ends = time.monotonic(), set(asked["ends"])
        prompts = [prompt["tokens"] for prompt in asked["prompts"]]
        hearts = [callback for callback in trainer.callbacks if isinstance(callback, callbacks.Heartbeat)]

        def moved():
            for heart in hearts:
                heart.beat("a prompt's next token")

        with torch.no_grad(), trainer.strategy.precision_plugin.val_step_context():
            said = greedy(list(trainer.strategy.megatron_parallel), prompts, self.tokens, ends, moved)
        if trainer.is_global_zero:
            decode = pl_module.tokenizer.tokenizer.decode
            replies = [
                {
                    "prompt": prompt["text"],
                    "reply": decode(tokens, skip_special_tokens=True),
                    "ended": bool(tokens) and tokens[-1] in ends,
                }
                for prompt, tokens in zip(asked["prompts"], said)
            ]
            seconds = round(time.monotonic() - began, 3)
            line = {"step": trainer.global_step, "seconds": seconds, "replies": replies}
            metrics.append(Path(self.record) / "samples.jsonl", [line])
            print(f"answers to {len(prompts)} prompts in {seconds:.1f} s: {self.record}/samples.jsonl", flush=True)


def greedy(model, prompts, tokens, ends, moved):
    """The next at most `tokens` tokens of each prompt (lists of ids), up to and with one of `ends`.

    `model` is the list of this rank's pipeline chunks, in evaluation mode. Every rank calls it, and gets all answers;
    moved() is called for each token of a prompt.
    """
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func

    tensor_parallel = parallel_state.get_tensor_model_parallel_world_size()
    multiple = math.lcm(16, tensor_parallel)  # what FP8 needs, and sequence parallelism
    length = math.ceil((max(map(len, prompts)) + tokens) / multiple) * multiple
    device = torch.cuda.current_device()
    places = torch.arange(length, device=device)[None]
    said = [[] for _ in prompts]
    for _ in range(tokens):
        open_ = [i for i, answer in enumerate(said) if not answer or answer[-1] not in ends]
        if not open_:
            break
        texts = [prompts[i] + said[i] for i in open_]
        while len(model) > 1 and len(texts) % parallel_state.get_pipeline_model_parallel_world_size():
            texts.append(texts[-1])  # an interleaved pipeline takes whole rounds of micro batches

        def step(texts, chunk):
            moved()
            text = next(texts)
            # What stands behind the text does not reach it: attention is causal.
            ids = torch.tensor([text + [0] * (length - len(text))], device=device)
            output = chunk(ids, places, None)
            return output, lambda logits, non_loss_data: next_token(logits[0, len(text) - 1])

        found = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=[iter(texts) for _ in model] if len(model) > 1 else iter(texts),
            model=model if len(model) > 1 else model[0],
            num_microbatches=len(texts),
            seq_length=length,
            micro_batch_size=1,
            forward_only=True,
            collect_non_loss_data=True,
        )
        chosen = torch.stack(found) if found else torch.zeros(len(texts), dtype=torch.int64, device=device)
        if parallel_state.get_pipeline_model_parallel_world_size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(chosen, last, group=parallel_state.get_pipeline_model_parallel_group())
        for i, token in zip(open_, chosen.tolist()):
            said[i].append(token)
    return said


def next_token(logits):
    """The id (a tensor) of the largest of the logits, of which each tensor parallel rank has a part of equal length."""
    from megatron.core import parallel_state

    part = logits.float()
    value, token = part.max(dim=0)
    token = token + parallel_state.get_tensor_model_parallel_rank() * part.shape[0]
    size = parallel_state.get_tensor_model_parallel_world_size()
    if size == 1:
        return token
    best = torch.stack([value.double(), token.double()])  # ids are whole in float64
    parts = [torch.empty_like(best) for _ in range(size)]
    torch.distributed.all_gather(parts, best, group=parallel_state.get_tensor_model_parallel_group())
    values, tokens = torch.stack(parts).unbind(dim=1)
    return tokens[values.argmax()].long()
