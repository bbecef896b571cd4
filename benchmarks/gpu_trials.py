"""What gpu.py tries or looks at with code in the rank; what proves itself moves into nemo_tutorial."""

import collections
import sys
import threading
import time
from pathlib import Path

import torch
from lightning.pytorch.callbacks import Callback


class FuseLoRA(Callback):
    """Have NeMo wrap linear layers in its TEFusedLoRALinear.

    Set after the model is built: from the start, it would also fuse the MLP, in which no layer can then be wrapped.
    """

    def on_fit_start(self, trainer, pl_module):
        pl_module.config.use_transformer_engine_op_fuser = True


class Idle(Callback):
    """Print where the host is, by its innermost calls, when the GPU has nothing to do, and how often it was found so.

    A thread asks every half millisecond or so, from the sixth step to the twelfth: while it does, steps take longer.
    """

    FRAMES, SHOWN = 8, 25
    FIRST, LAST = 6, 12
    step = 0

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.step += 1
        if self.step == self.FIRST:
            self.found, self.asked, self.ends = collections.Counter(), 0, False
            self.stream, self.watched = torch.cuda.current_stream(), threading.main_thread().ident
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if self.step == self.LAST:
            self.ends = True
            self.thread.join()
            print(f"idle: {self.found.total()} of {self.asked} times", flush=True)
            for where, count in self.found.most_common(self.SHOWN):
                print(f"idle {count}: {where}", flush=True)

    def _watch(self):
        while not self.ends:
            self.asked += 1
            if self.stream.query():
                frame, calls = sys._current_frames()[self.watched], []
                while frame and len(calls) < self.FRAMES:
                    calls.append(f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno} {frame.f_code.co_name}")
                    frame = frame.f_back
                self.found[" < ".join(calls)] += 1
            time.sleep(1e-4)
