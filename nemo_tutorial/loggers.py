"""Lightning's loggers of Weights & Biases and MLflow, for runs that must not end because a server can't be reached.

They run in the ranks. The first error is said, once; training goes on.
"""

import json
import os
import secrets
from pathlib import Path

from lightning.pytorch.loggers import MLFlowLogger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only

SECONDS = 30  # for the first answer of a server


def warn(message):
    """A warning in the rank's log."""
    print(f"warning: {message}", flush=True)


class WeightsAndBiases(WandbLogger):
    """Where the server can't be reached or refuses the key, the run is kept offline, for `wandb sync`."""

    failed = False

    @property
    def experiment(self):
        if self._experiment is None and rank_zero_only.rank == 0:
            import wandb

            kept = Path(self._wandb_init["dir"], "record", "wandb_id")  # a run that goes on is one run there too
            kept.parent.mkdir(parents=True, exist_ok=True)  # without the folder, wandb takes one under /tmp
            if not kept.is_file():
                kept.write_text(secrets.token_hex(4))
            self._wandb_init["id"] = kept.read_text()
            try:
                settings = wandb.Settings(init_timeout=float(os.environ.get("WANDB_INIT_TIMEOUT", SECONDS)))
                self._experiment = wandb.init(**self._wandb_init, settings=settings)
            except Exception as error:  # of the network, of the key: wandb has many kinds
                wandb.teardown()  # else the next init waits for the same service
                self._experiment = wandb.init(**self._wandb_init, mode="offline")
                warn(
                    f"--wandb: {first_line(error)}; the run is kept offline, send it later: "
                    f"wandb sync {os.path.dirname(self._experiment.dir)}"
                )
        return super().experiment

    def log_metrics(self, metrics, step=None):
        attempt(self, "--wandb", super().log_metrics, metrics, step)

    def log_hyperparams(self, params):
        attempt(self, "--wandb", super().log_hyperparams, params)

    def finalize(self, status):
        attempt(self, "--wandb", super().finalize, status)


class MLflow(MLFlowLogger):
    """Where the server can't be reached, nothing more is sent to it; record/metrics.jsonl has the numbers."""

    failed = False

    def __init__(self, *args, **kwargs):
        # MLflow's own are seven tries that wait longer each time, and two minutes for each.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(SECONDS))
        # MLflow 3 refuses a plain folder otherwise: it would rather have a database, which mlflow-skinny can't.
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        attempt(self, "--mlflow", super().__init__, *args, **kwargs)
        self.kept = Path(kwargs["save_dir"]).parent / "record" / "mlflow_run.json"
        if self.kept.is_file() and not self.failed:  # a run that goes on is one run there too
            known = json.loads(self.kept.read_text())
            self._run_id = known["run"] if known["server"] == self._tracking_uri else None

    @property
    def experiment(self):
        found = attempt(self, "--mlflow", lambda: super(MLflow, self).experiment)
        if found and self._run_id and rank_zero_only.rank == 0 and not self.kept.is_file():
            self.kept.parent.mkdir(parents=True, exist_ok=True)
            self.kept.write_text(json.dumps({"server": self._tracking_uri, "run": self._run_id}))
        return found

    def log_metrics(self, metrics, step=None):
        # NeMo's steps are floats, which MLflow writes into its files and can't read again.
        attempt(self, "--mlflow", super().log_metrics, metrics, None if step is None else int(step))

    def log_hyperparams(self, params):
        attempt(self, "--mlflow", super().log_hyperparams, params)

    def finalize(self, status):
        attempt(self, "--mlflow", super().finalize, status)


def attempt(logger, flag, call, *args, **kwargs):
    """Call a logger's method; after an error, which is said, never again."""
    if logger.failed:
        return None
    try:
        return call(*args, **kwargs)
    except Exception as error:  # a logger's trouble of any kind must not end the training
        logger.failed = True
        if rank_zero_only.rank == 0:
            warn(f"{flag}: {first_line(error)}; no more is logged there, training goes on")
        return None


def first_line(error):
    """An exception in a line, without a trace."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]
