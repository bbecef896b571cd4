"""Which checkpoint a start goes on from, chosen in the ranks."""

from pathlib import Path

from nemo import lightning as nl

from nemo_tutorial import checkpoints


class NewestComplete(nl.AutoResume):
    """NeMo's AutoResume with our choice: the complete checkpoint with the most steps in `run`.

    NeMo's own goes by the time of a link, and starts over where there is none. Chosen in the ranks and not in the
    launcher, because a Slurm job that is requeued starts with the recipe of its first start.
    """

    def __init__(self, run, **kwargs):
        super().__init__(**kwargs)
        self.run = run

    def get_trainer_ckpt_path(self, model=None):
        found = checkpoints.latest(self.run)
        # Its real name: NeMo's link to the last one moves on while this one is still needed.
        self.resume_from_path = str(Path(found).resolve()) if found else None
        if not found:
            damaged = [path.name for path in Path(self.run, "checkpoints").glob("*") if checkpoints.is_nemo(path)]
            damaged = [
                name for name in damaged if not Path(self.run, "checkpoints", name + checkpoints.UNFINISHED).exists()
            ]
            if damaged:  # else hours of training would begin again without a word
                raise RuntimeError(f"{self.run}/checkpoints holds no complete checkpoint: {', '.join(sorted(damaged))}")
            return None
        if (Path(found) / checkpoints.NO_OPTIMIZER).exists():
            raise RuntimeError(f"the optimizer state of {found} was dropped: the run can't go on from it")
        self.restore_config = None  # of a start from other weights
        return super().get_trainer_ckpt_path(model)
