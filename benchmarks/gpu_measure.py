"""What every contestant of gpu.py is measured with: the same data, the same clock, the same formula."""

import json
import re
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

PEAK = 989e12  # dense bf16 of an H100 or H200 SXM, by the vendor's data sheet; MFU is relative to it
# Kernel names, in the order in which they are tried.
CLASSES = {
    "attention": "fmha|flash|sdpa|attention",
    "loss": "cross_entropy|online_softmax|element_mul|log_softmax|nll_loss|liger",
    "gemm": "gemm|nvjet|cutlass|wgmma|xmma|cublas|splitk",
    "communication": "nccl",
    "optimizer": "adam|multi_tensor|l2norm|foreach",
    "fp8 casts": "cast_|_cast|quantize|amax|fp8|transpose_fusion",
    "norm": "rmsnorm|layernorm|ln_fwd|ln_bwd|_norm_",
    "rope": "rope|rotary",
    "copy": "memcpy|memset|copy|catarray|fill",
    "elementwise": "",
}


def tokens(vocabulary, seed, index, count):
    """`count` token ids of sample `index`, int64, (count,): Zipf-distributed, half of them decided by the one before.

    So that there is more to learn than how frequent each is: that takes fifty steps, and then all seeds lose the same.
    """
    generator = np.random.default_rng((seed, index))
    drawn = (generator.zipf(1.2, count) - 1) % vocabulary
    places = np.arange(count)
    fresh = np.maximum.accumulate(np.where(generator.random(count) < 0.5, places, 0))  # the last that was drawn
    for since in range(1, int((places - fresh).max()) + 1):
        follows = places[places - fresh == since]
        drawn[follows] = (drawn[follows - 1] * 7919 + 12345) % vocabulary
    return drawn


def lengths(seed, count):
    """(prompt, answer) tokens of `count` instruction rows: log-normal, about 200 together, like Alpaca and Dolly."""
    generator = np.random.default_rng(seed)
    drawn = np.exp(generator.normal((4.1, 4.6), (0.7, 0.9), (count, 2)))
    return [(int(a), int(b)) for a, b in np.clip(drawn, 4, 1500)]


def flops_a_token(parameters, trained, layers, hidden, seq):
    """FLOP a token of forward and backward: 6 N + 6 L h s, causal attention counted once.

    N are the parameters in matrix products (an untied input embedding is not); frozen ones need no weight gradient,
    so 4 for each of those. Recomputation and FP8 are not counted.
    """
    return 4 * parameters + 2 * trained + 6 * layers * hidden * seq


class Steps:
    """Times of steps from CUDA events at their ends, so that nothing waits; losses stay on the device until the end."""

    def __init__(self, steps, warmup, profile):
        self.timed, self.warmup, self.profiled = steps, warmup, 4 if profile and torch.cuda.is_available() else 0
        self.total = warmup + steps + self.profiled
        self.ends, self.losses, self.kernels, self.profiler = [], [], None, None

    def begin(self):
        """Before a step."""
        if self.profiled and len(self.ends) == self.total - self.profiled:
            self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA])
            self.profiler.__enter__()
        if self.profiler:
            torch.cuda._sleep(100)  # a kernel that is easily found: it marks the step's start
        if not self.ends and torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def end(self, loss):
        """After a step; `loss` is a tensor of one element."""
        self.losses.append(loss.detach().reshape(()).float().clone())
        if torch.cuda.is_available():
            self.ends.append(torch.cuda.Event(enable_timing=True))
            self.ends[-1].record()
        else:
            self.ends.append(time.perf_counter())
        if len(self.ends) == self.total - self.profiled and torch.cuda.is_available():
            self.memory = {
                "allocated_gb": round(torch.cuda.max_memory_allocated() / 2**30, 1),
                "reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 1),
            }
        if self.profiler and len(self.ends) == self.total:
            torch.cuda.synchronize()
            self.profiler.__exit__(None, None, None)
            self.kernels = kernels(self.profiler)

    def result(self, tokens, flops):
        """The row: seconds a step, tokens/s, TFLOP/s, MFU, memory, loss of every step, kernel times.

        `tokens` of a step, and tokens/s are of the median one; or a list of every step's, if they differ: then those of
        all timed steps in their time.
        """
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            seconds = [a.elapsed_time(b) / 1e3 for a, b in zip(self.ends, self.ends[1:])]
        else:
            seconds = [b - a for a, b in zip(self.ends, self.ends[1:])]
        seconds = seconds[self.warmup - 1 : self.total - self.profiled - 1]
        median = statistics.median(seconds)
        if isinstance(tokens, list):
            tokens = statistics.mean(tokens[self.warmup : self.total - self.profiled])
            rate = tokens / statistics.mean(seconds)
        else:
            rate = tokens / median
        row = {
            "step_s": round(median, 4),
            "step_mean": round(statistics.mean(seconds), 4),
            "step_min": round(min(seconds), 4),
            "step_max": round(max(seconds), 4),
            "steps": len(seconds),
            "tokens_a_step": round(tokens),
            "tok_s": round(rate),
            "tflops": round(rate * flops / 1e12, 1),
            "mfu": round(rate * flops / PEAK, 4),
            "loss": [round(loss.item(), 5) for loss in self.losses],
        }
        return row | getattr(self, "memory", {}) | ({"kernels": self.kernels} if self.kernels else {})


def kernels(profiler):
    """Milliseconds a step of each class of kernels and of the longest ones, and the share in which the GPU was idle.

    The window is two whole steps, from the mark at the start of the second profiled step to that of the fourth.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    work = [event for event in events if event.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    marks = sorted(event["ts"] for event in work if "spin_kernel" in event["name"])
    if len(marks) < 4:
        return None
    between = statistics.mean(idle_around(mark, work) for mark in marks[1:4])
    start, end = marks[1], marks[3]
    classes, names, counts = {}, {}, {}
    for event in work:
        name = event["name"]
        if start <= event["ts"] < end and "spin_kernel" not in name:
            kind = next(kind for kind, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE))
            classes[kind] = classes.get(kind, 0) + event["dur"] / 2e3
            names[name] = names.get(name, 0) + event["dur"] / 2e3
            counts[name] = counts.get(name, 0) + 1
    found = list(gaps(work, start, end))
    long = sorted(((round(gap / 1e3, 3), where) for gap, where in found), reverse=True)
    longest = sorted(names.items(), key=lambda item: -item[1])[:60]
    return {
        "step_ms": round((end - start) / 2e3, 2),
        "idle": round(sum(gap for gap, _ in found) / (end - start), 4),
        "idle_between_steps_ms": round(between / 1e3, 3),
        "classes_ms": {kind: round(value, 2) for kind, value in sorted(classes.items(), key=lambda item: -item[1])},
        "longest_ms": {f"{name[:160]} x{counts[name] // 2}": round(value, 2) for name, value in longest},
        "gaps": len(found),
        "gaps_over_0.1_ms": {
            "count": sum(gap > 0.1 for gap, _ in long),
            "sum_ms": round(sum(gap for gap, _ in long if gap > 0.1), 1),
        },
        "longest_gaps_ms": long[:20],
    }


def gaps(work, start, end):
    """(microseconds, "kernel before -> kernel after") of each time from `start` to `end` in which no kernel runs."""
    until, last = start, "start"
    for event in sorted((e for e in work if start <= e["ts"] < end), key=lambda event: event["ts"]):
        if event["ts"] > until:
            yield event["ts"] - until, f"{last[:60]} -> {event['name'][:60]}"
        until, last = max(until, event["ts"] + event["dur"]), event["name"]
    if until < end:
        yield end - until, f"{last[:60]} -> end"


def idle_around(mark, work):
    """Microseconds in which the GPU does nothing between a step's last matrix product and the next step's first."""
    products = [event for event in work if re.search(CLASSES["gemm"], event["name"], re.IGNORECASE)]
    start = max((e["ts"] + e["dur"] for e in products if e["ts"] < mark), default=mark)
    end = min((e["ts"] for e in products if e["ts"] > mark), default=mark)
    return sum(gap for gap, _ in gaps(work, start, end))


def ceilings():
    """What this GPU reaches: a bf16 product of 8192^3 on random data (TFLOP/s), a copy (TB/s, read plus written).

    A product of a few ms is faster than one of many in a row, at which the GPU reaches its power limit and slows down;
    so both: the median of twenty, and that of the last second of four.
    """
    size = 8192
    a, b = (torch.randn(size, size, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    source = torch.empty(2**31, device="cuda", dtype=torch.uint8).random_()
    target = torch.empty_like(source)

    def milliseconds(function, repeats=20):
        for _ in range(5):
            function()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
        events[0].record()
        for event in events[1:]:
            function()
            event.record()
        torch.cuda.synchronize()
        return statistics.median(x.elapsed_time(y) for x, y in zip(events, events[1:]))

    product, copy = milliseconds(lambda: torch.mm(a, b)), milliseconds(lambda: target.copy_(source))
    for _ in range(3):
        milliseconds(lambda: torch.mm(a, b), int(1000 / product))
    sustained = milliseconds(lambda: torch.mm(a, b), int(1000 / product))
    return {
        "gemm_tflops": round(2 * size**3 / product / 1e9, 1),
        "gemm_tflops_sustained": round(2 * size**3 / sustained / 1e9, 1),
        "copy_tb_s": round(2 * source.numel() / copy / 1e9, 2),
    }
