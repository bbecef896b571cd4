"""A script's main, run in this process up to the launch: the recipe that its flags make. Needs NeMo."""

import json
import shlex
import shutil
from types import SimpleNamespace

import pytest

SCRIPTS = {"pretrain": "pretraining/pretrain.py", "finetune": "finetuning/finetune.py"}
BASE = {
    "pretrain": "-D data/pre --split 90,10,0 --nemo_model nemo_ckpt/tiny -s 128 -g 8 --max_steps 20 --dry_run full "
    "--accelerator gpu --num_gpus 1",
    "finetune": "-D rows --nemo_model nemo_ckpt/tiny -s 256 -g 8 --max_steps 20 --dry_run full --accelerator gpu "
    "--num_gpus 1",
}
PEFT = "--peft lora "


class Refused(Exception):
    """The command was refused with this message."""


@pytest.fixture(scope="session")
def tuned_stages(stages, write_rows):
    """The stages' folder with 64 rows, a mixture of experts, and a model with another tokenizer."""
    write_rows(stages / "rows", 64, 64)
    (stages / "prompts.txt").write_text("台灣最高的山是？\n", encoding="utf-8")
    for name in ("other", "experts"):
        shutil.copytree(stages / "hf_model/tiny", stages / "hf_model" / name)
    tokenizer = json.loads((stages / "hf_model/other/tokenizer.json").read_text(encoding="utf-8"))
    tokenizer["truncation"] = {"max_length": 9}
    (stages / "hf_model/other/tokenizer.json").write_text(json.dumps(tokenizer))
    config = json.loads((stages / "hf_model/experts/config.json").read_text())
    config |= {"architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "num_local_experts": 4}
    config |= {"num_experts_per_tok": 2, "sliding_window": None, "rope_scaling": None}
    (stages / "hf_model/experts/config.json").write_text(json.dumps(config))
    return stages


@pytest.fixture
def build(tuned_stages, load_script, monkeypatch, capsys):
    """Run a script's main with flags over the base ones, up to the launch: its arguments, recipe and executor."""
    from nemo_tutorial import runs

    def run(kind, words, base=None):
        module, caught = load_script(SCRIPTS[kind]), []

        def start(args, stage, source, build_recipe, prepare=None):
            from nemo_tutorial import executors, recipes, slurm

            recipe = recipes.resolved(build_recipe(), args)
            executor, job = None, ""
            if args.executor == "slurm":
                job = slurm.script(args, stage, executors.environment(args))
            else:
                executor = executors.local(args)
            caught.append(SimpleNamespace(args=args, recipe=recipe, executor=executor, job=job, source=source))

        monkeypatch.setattr(runs, "start", start)
        monkeypatch.chdir(tuned_stages)
        capsys.readouterr()
        try:
            module.main(shlex.split(f"{BASE[kind] if base is None else base} {words}"))
        except SystemExit as stop:
            assert stop.code == 2
            raise Refused(capsys.readouterr().err) from None
        caught[0].said = capsys.readouterr()
        return caught[0]

    return run
