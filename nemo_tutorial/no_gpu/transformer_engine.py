"""First in the path of the no-GPU mode's ranks: Transformer Engine's layers run on GPUs only, so it is not there."""

raise ModuleNotFoundError("hidden by the no-GPU mode")
