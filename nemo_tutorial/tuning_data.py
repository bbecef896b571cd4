"""What the ranks read instruction data with where NeMo's own data module can't: rows that are not packed."""

from nemo.collections import llm


class UnpackedRows(llm.FineTuningDataModule):
    """NeMo's data module on prepared rows, one a sample, padded to the longest of a batch.

    NeMo takes prepared tokens only as packs, and those only with a micro batch of one. `dataset_root` is the folder
    of training.npy and validation.npy.
    """

    @property
    def train_path(self):
        return self.dataset_root / "training.npy"

    @property
    def validation_path(self):
        return self.dataset_root / "validation.npy"
