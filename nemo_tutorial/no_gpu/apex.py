"""First in the path of the no-GPU mode's ranks: Apex's norms run on GPUs only, so it is not there."""

raise ModuleNotFoundError("hidden by the no-GPU mode")
