"""What must stay equal between the scripts: flags, checks, recipes, launch.

`arguments`, `models`, `checkpoints`, `corpora`, `hub`, `megatron_data`, `blends`, `schedule`, `preflight`, `slurm`,
`network` and `terminal` need only the standard library; the others import NeMo, which takes half a minute, so scripts
import those late.
"""

import os

from nemo_tutorial import compat

# NeMo-Run reads this once, when it is first imported, and NeMo imports it: set it before either.
# Experiments then lie in ./experiments, where the user works, instead of the home folder.
os.environ.setdefault("NEMORUN_HOME", os.getcwd())

# Each process of ours that imports NeMo comes by here before, the ranks too: NeMo-Run loads the script there first.
compat.leave_out_allocator()
