"""What the progress callback costs a step, on this machine: microseconds of its hooks, beside those of Lightning's.

From the repository root, without a GPU and without NeMo:

    python benchmarks/callbacks.py
    python benchmarks/callbacks.py --steps 5000 --micro_batches 512

A real Lightning trainer logs what NeMo logs at each step (loss, learning rate, gradient norm, step) for a model that
does nothing; the hooks are timed one by one. Counting tokens is timed as it is done in training, per micro batch.
"""

import statistics
import sys
import tempfile
import time
import types
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--steps", type=arguments.positive, default=2000, help="[2000]")
    parser.add_argument("--interval", type=arguments.positive, default=10, help="--log_interval of the run [10]")
    parser.add_argument("--micro_batches", type=arguments.positive, default=16, help="micro batches a step [16]")
    return parser.parse_args(argv)


def measure(args, folder):
    """{hook: [microseconds a step, ...]}, and the seconds of the whole loop without and with the callback."""
    import torch
    from lightning.pytorch import Callback, LightningModule, Trainer
    from megatron.core import parallel_state

    from nemo_tutorial import progress, throughput

    parallel_state.get_data_parallel_world_size = lambda: 1  # no process group here
    taken = {}

    class Nothing(LightningModule):
        """NeMo's values, logged as NeMo logs them, and no training."""

        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def data_step(self, batches):
            return next(batches)

        def training_step(self, batch, batch_idx):
            batches = iter([batch] * args.micro_batches)
            began = time.perf_counter()
            for _ in range(args.micro_batches):
                self.data_step(batches)
            taken.setdefault("counting tokens", []).append(1e6 * (time.perf_counter() - began))
            self.log("global_step", float(self.trainer.global_step), prog_bar=True, batch_size=1)
            self.log("step", float(self.trainer.global_step))
            self.log("reduced_train_loss", self.weight.detach()[0] + 2, prog_bar=True, batch_size=1)
            self.log("lr", 1e-5, prog_bar=True, batch_size=1)
            self.log("grad_norm", 1.0, batch_size=1)
            return (self.weight * 0).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

    class Timed(Callback):
        """The callback, its hooks timed."""

        def __init__(self, own):
            for name in dir(own):
                if name.startswith("on_") or name in ("setup", "teardown"):
                    setattr(self, name, self.timed(name, getattr(own, name)))

        @staticmethod
        def timed(name, hook):
            def call(*hook_args, **hook_kwargs):
                began = time.perf_counter()
                hook(*hook_args, **hook_kwargs)
                taken.setdefault(name, []).append(1e6 * (time.perf_counter() - began))

            return call

    batch = {"tokens": torch.zeros(1, 4096, dtype=torch.int64)}
    cost = throughput.cost(
        types.SimpleNamespace(
            tie_word_embeddings=False,
            vocab_size=128256,
            hidden_size=4096,
            active_parameters=8030261248,
            num_hidden_layers=32,
            num_attention_heads=32,
            head_dim=128,
            sliding_window=0,
        )
    )
    loops, before = [], None
    for own in ([], [Timed(progress.Progress(str(folder / "record/metrics.jsonl"), args.interval, cost, True))]):
        taken.clear()
        (folder / "record").mkdir(exist_ok=True)
        trainer = Trainer(
            max_steps=args.steps,
            accelerator="cpu",
            logger=False,
            callbacks=own,
            enable_progress_bar=False,
            enable_checkpointing=False,
            enable_model_summary=False,
            limit_val_batches=0,
            log_every_n_steps=args.interval,
        )
        began = time.perf_counter()
        trainer.fit(Nothing(), torch.utils.data.DataLoader([batch] * args.steps, batch_size=None))
        loops.append(time.perf_counter() - began)
        before = before or statistics.median(taken["counting tokens"])
    taken["counting tokens"] = [value - before for value in taken["counting tokens"]]
    return taken, loops


def main(argv=None):
    args = parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        taken, loops = measure(args, Path(folder))
    rows, total = [], 0.0
    for name in ("counting tokens", "on_train_batch_start", "on_train_batch_end"):
        mean = statistics.fmean(taken[name])
        total += mean
        rows.append([name, f"{statistics.median(taken[name]):.1f}", f"{mean:.1f}", f"{max(taken[name]):.0f}"])
    rows.append(["together", "", f"{total:.1f}", ""])
    terminal.table(["microseconds a step", "median", "mean", "most"], rows)
    without, with_ = (1e6 * seconds / args.steps for seconds in loops)
    print(f"Lightning's whole loop: {without:.0f} without, {with_:.0f} with; 0.5 % of a step of 1 s is 5000")


if __name__ == "__main__":
    main()
