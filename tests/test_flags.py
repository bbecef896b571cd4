"""Every flag of pretrain.py and finetune.py reaches the recipe or the launch, or is refused: one case each.

The recipes are built in this process, by the scripts' own `main`, up to the launch.
"""

import pytest
from building import BASE, PEFT, SCRIPTS, Refused
from conftest import ROOT
from test_cli import parser_of

pytestmark = pytest.mark.nemo


def hook(recipe, name):
    """The callback of that class in a recipe, or None."""
    return next((call for call in recipe.trainer.callbacks if call.__fn_or_cls__.__name__ == name), None)


def refused(message):
    """A case whose command is refused with `message`."""
    return ("refused", message)


SLURM = "--executor slurm "
# flag -> (words, what must then be true of the built run, words without the flag of which it must not be)
COMMON = {
    "--executor": ("--executor slurm", lambda r: r.job.startswith("#!/bin/bash")),
    "--experiment": ("--experiment mine", lambda r: r.recipe.log.name == "mine"),
    "--num_nodes": (SLURM + "-N 2", lambda r: r.recipe.trainer.num_nodes == 2 and "#SBATCH --nodes=2\n" in r.job),
    "--num_gpus": ("--num_gpus 2", lambda r: r.recipe.trainer.devices == r.executor.ntasks_per_node == 2),
    "--accelerator": ("--accelerator cpu", lambda r: r.recipe.trainer.accelerator == "cpu"),
    **{
        flag: (f"{SLURM}{words}", lambda r, text=text: text in r.job)
        for flag, words, text in (
            ("--account", "-a lab", "--account=lab\n"),
            ("--partition", "-p fast", "--partition=fast\n"),
            ("--qos", "--qos high", "--qos=high\n"),
            ("--time", "--time 2:00:00", "--time=2:00:00\n"),
            ("--gres", "--gres gpu:h100:1", "--gres=gpu:h100:1\n"),
            ("--mem", "--mem 100G", "--mem=100G\n"),
            ("--exclusive", "--exclusive", "#SBATCH --exclusive\n"),
            ("--constraint", "--constraint nvlink", "--constraint=nvlink\n"),
            ("--nodelist", "--nodelist n1", "--nodelist=n1\n"),
            ("--container_image", "-i image", "--container-image=image "),
            ("--container", "-i image --container apptainer", "apptainer exec"),
            ("--mount", "-i image --mount /tmp", "/tmp:/tmp"),
            ("--setup", "--setup 'module load x'", "\nmodule load x\n"),
            ("--env", "--env HOME", "${HOME:?"),
            ("--srun_arg", "--srun_arg=--cpu-bind=cores", "--cpu-bind=cores"),
            ("--sbatch_arg", "--sbatch_arg mail-type=END", "--mail-type=END\n"),
            ("--chain", "--chain 2", "#SBATCH --no-requeue\n"),
            ("--save_before", "--save_before 300", "--signal=B:USR1@300\n"),
            ("--check_network", "-N 1 --check_network", " --check_network &\n"),
        )
    },
    "--no_exclusive": (SLURM + "-N 2 --no_exclusive", lambda r: "--nodes=2" in r.job and "--exclusive" not in r.job),
    "--no_check_network": (
        SLURM + "-N 2 --no_check_network",
        lambda r: "--nodes=2" in r.job and "check_network" not in r.job,
    ),
    "--wait": ("--wait", refused("--wait")),
    "--keep_optimizer": ("--keep_optimizer last", lambda r: hook(r.recipe, "KeepLastOptimizer") is not None),
    "--hang_timeout": ("--hang_timeout 41", lambda r: 41 in hook(r.recipe, "Heartbeat").__arguments__.values()),
    "--max_loss_spike": ("--max_loss_spike 3", lambda r: 3 in hook(r.recipe, "LossGuard").__arguments__.values()),
    "--max_restarts": ("--executor slurm --max_restarts 2", refused("--max_restarts 2")),
    "--log_interval": ("--log_interval 7", lambda r: r.recipe.trainer.log_every_n_steps == 7),
    "--generate_prompts": (
        "--generate_prompts prompts.txt",
        lambda r: hook(r.recipe, "Samples") is not None,
    ),
    "--generate_tokens": (
        "--generate_prompts prompts.txt --generate_tokens 5",
        lambda r: 5 in hook(r.recipe, "Samples").__arguments__.values(),
    ),
    "--mlflow": ("--mlflow", lambda r: r.recipe.log.extra_loggers[0].__fn_or_cls__.__name__ == "MLflow"),
    "--model_size": ("--model_size 8B", refused("--model_size 8B: nemo_ckpt/tiny has 918.1 K parameters")),
    "--hf_model_id": ("--hf_model_id hf_model/other", refused("has another tokenizer than nemo_ckpt/tiny")),
    "--nemo_model": (
        "--nemo_model nemo_ckpt/tiny",
        lambda r: r.recipe.resume.restore_config.path.endswith("nemo_ckpt/tiny"),
    ),
    "--seq_length": ("--seq_length 64", lambda r: r.recipe.data.seq_length == r.recipe.model.config.seq_length == 64),
    "--max_steps": ("--max_steps 30", lambda r: r.recipe.trainer.max_steps == 30),
    "--exit_interval": ("--exit_interval 5", lambda r: hook(r.recipe, "ExitInterval").steps == 5),
    "--micro_batch_size": ("-m 2", lambda r: r.recipe.data.micro_batch_size == 2),
    "--lr": ("--lr 0.5", lambda r: r.recipe.optim.config.lr == 0.5),
    "--min_lr": ("--min_lr 1e-9", lambda r: r.recipe.optim.lr_scheduler.min_lr == 1e-9),
    "--warmup_steps": ("--warmup_steps 7", lambda r: r.recipe.optim.lr_scheduler.warmup_steps == 7),
    "--lr_decay": ("--lr_decay constant", lambda r: "WarmupPolicy" in str(r.recipe.optim.lr_scheduler)),
    "--lr_wsd_decay_steps": (
        "--lr_decay wsd --lr_wsd_decay_steps 6 --warmup_steps 2",
        lambda r: int(r.recipe.optim.lr_scheduler.hold_ratio * 20) == 12,
    ),
    "--save_interval": (
        "--save_interval 10 --val_check_interval 5",
        lambda r: r.recipe.trainer.val_check_interval == 5 and hook(r.recipe, "SaveInterval").steps == 10,
    ),
    "--early_stopping_patience": (
        "--early_stopping_patience 3",
        lambda r: hook(r.recipe, "EarlyStop").patience == 3,
    ),
    "--val_check_interval": ("--val_check_interval 10", lambda r: r.recipe.trainer.val_check_interval == 10),
    "--limit_val_batches": ("--limit_val_batches 1", lambda r: r.recipe.trainer.limit_val_batches == 1),
    "--save_top_k": ("--save_top_k 5", lambda r: r.recipe.log.ckpt.save_top_k == 5),
    "--seed": ("--seed 7", lambda r: r.recipe.data.seed == hook(r.recipe, "Seed").seed == 7),
    "--num_workers": ("--num_workers 9", lambda r: r.recipe.data.num_workers == 9),
    "--precision": ("--precision fp32", lambda r: r.recipe.trainer.plugins.precision == "32"),
    "--fp8": ("--fp8", lambda r: r.recipe.trainer.plugins.fp8 == "hybrid"),
    "--fp8_recipe": ("--fp8 --fp8_recipe mxfp8", lambda r: r.recipe.trainer.plugins.fp8_recipe == "mxfp8"),
    "--performance": ("--performance off", lambda r: "te" != getattr(r.recipe.model.config, IMPL, "native")),
    "--gpu_memory": ("--gpu_memory 0.5", lambda r: "DOES NOT FIT" in r.said.out and "(--gpu_memory)" in r.said.out),
    "--recompute": ("--recompute full", lambda r: r.recipe.model.config.recompute_granularity == "full"),
    "--recompute_modules": (
        "--recompute selective --recompute_modules core_attn",
        lambda r: r.recipe.model.config.recompute_modules == ["core_attn"],
    ),
    "--recompute_method": (
        "--recompute full --recompute_method block",
        lambda r: r.recipe.model.config.recompute_method == "block",
    ),
    "--recompute_num_layers": (
        "--recompute full --recompute_num_layers 2",
        lambda r: r.recipe.model.config.recompute_num_layers == 2,
    ),
    "--use_precision_aware_optimizer": (
        "--use_precision_aware_optimizer",
        lambda r: r.recipe.optim.config.use_precision_aware_optimizer,
    ),
    **{
        f"--{name}": (
            f"--use_precision_aware_optimizer --{name} {value}",
            lambda r, name=name, dtype=dtype: str(getattr(r.recipe.optim.config, name)) == f"torch.{dtype}",
        )
        for name, value, dtype in (
            ("exp_avg_dtype", "bf16", "bfloat16"),
            ("exp_avg_sq_dtype", "fp8", "uint8"),
            ("main_params_dtype", "fp16", "float16"),
        )
    },
    "--main_grads_dtype": (
        "--use_precision_aware_optimizer --main_grads_dtype bf16",
        lambda r: (
            str(r.recipe.optim.config.main_grads_dtype) == "torch.bfloat16"
            and r.recipe.trainer.plugins.grad_reduce_in_fp32 is False
        ),
    ),
    "--tensor_model_parallel_size": (
        "--num_gpus 2 -T 2",
        lambda r: r.recipe.trainer.strategy.tensor_model_parallel_size == 2,
    ),
    "--pipeline_model_parallel_size": (
        "--num_gpus 2 -P 2",
        lambda r: r.recipe.trainer.strategy.pipeline_model_parallel_size == 2,
    ),
    "--context_parallel_size": (
        "--num_gpus 2 -C 2",
        lambda r: r.recipe.trainer.strategy.context_parallel_size == 2,
    ),
    "--virtual_pipeline_model_parallel_size": (
        "--num_gpus 2 -P 2 --virtual_pipeline_model_parallel_size 2",
        refused("x --pipeline_model_parallel_size 2 does not divide the 2 layers; leave it out"),
    ),
    "--sequence_parallel": ("--sequence_parallel", refused("--sequence_parallel needs")),
    "--no_sequence_parallel": (
        "--num_gpus 2 -T 2 --no_sequence_parallel",
        lambda r: (
            r.recipe.trainer.strategy.tensor_model_parallel_size == 2
            and r.recipe.trainer.strategy.sequence_parallel is False
        ),
    ),
    "--expert_model_parallel_size": (
        "--num_gpus 2 --expert_model_parallel_size 2",
        refused("--expert_model_parallel_size 2: the model has no experts"),
    ),
    "--expert_tensor_parallel_size": (
        "--num_gpus 2 --expert_tensor_parallel_size 2",
        refused("--expert_tensor_parallel_size 2: the model has no experts"),
    ),
    "--wandb": ("--wandb", lambda r: r.recipe.log.wandb.project == r.args.experiment),
    "--wandb_project": ("--wandb --wandb_project p", lambda r: r.recipe.log.wandb.project == "p"),
    "--wandb_name": ("--wandb --wandb_name n", lambda r: r.recipe.log.wandb.name == "n"),
}
IMPL = "cross_entropy_fusion_impl"
OWN = {
    "pretrain": {
        "--global_batch_size": ("-g 4", lambda r: r.recipe.data.global_batch_size == 4),
        "--dataset_path": ("", lambda r: r.recipe.data.paths[-1].endswith("data/pre/sample_text_document")),
        "--split": ("--split 80,20,0", lambda r: r.recipe.data.split == "80,20,0"),
    },
    "finetune": {
        "--global_batch_size": ("-g 4 --no_packing", lambda r: r.recipe.data.global_batch_size == 4),
        "--dataset_path": ("", lambda r: "rows/prepared" in r.recipe.data.dataset_root),
        "--prompt_template": (
            "--prompt_template 'Q {input} A {output}'",
            lambda r: "Q " in chat_template(r),
        ),
        "--system_prompt": ("--system_prompt Kind. --show_samples 1", lambda r: "Kind." in r.said.out),
        "--packing": ("--packing -m 2", refused("--packing does not go with --micro_batch_size 2")),
        "--no_packing": ("--no_packing", lambda r: r.recipe.data.__fn_or_cls__.__name__ == "UnpackedRows"),
        "--packed_sequence_size": (
            "--packed_sequence_size 128",
            lambda r: r.recipe.data.packed_sequence_specs.packed_sequence_size == 128,
        ),
        "--overlong": ("-s 16 --overlong error --no_packing", refused("--overlong error: 64 rows")),
        "--show_samples": ("--show_samples 3", lambda r: r.said.out.count("玉山。") >= 3),
        "--peft": (PEFT, lambda r: r.recipe.peft.__fn_or_cls__.__name__ == "LoRA"),
        "--lora_rank": (PEFT + "--lora_rank 4", lambda r: (r.recipe.peft.dim, r.recipe.peft.alpha) == (4, 8)),
        "--lora_alpha": (PEFT + "--lora_alpha 5", lambda r: (r.recipe.peft.dim, r.recipe.peft.alpha) == (8, 5)),
        "--lora_dropout": (PEFT + "--lora_dropout 0.1", lambda r: r.recipe.peft.dropout == 0.1),
        "--lora_target_modules": (
            PEFT + "--lora_target_modules linear_qkv",
            lambda r: r.recipe.peft.target_modules == ["linear_qkv"],
        ),
    },
}
# Flags whose effect is not in a recipe: the tests that show it.
ELSEWHERE = {
    "--config": "test_config.py::test_a_file_and_flags_over_it",
    "--dry_run": "test_plan.py::test_a_dry_run_is_quick_and_imports_nothing_heavy",
    "--allow_change": "test_faults.py::test_change_is_refused_with_old_and_new",
    "--fresh": "test_faults.py::test_fresh_refuses_a_run",
    "--trust_checkpoint": "test_trust.py::test_every_script_that_loads_one",
    "--hf_token": "test_cli.py::test_token_leaves_the_command_line",
    "--wandb_token": "test_cli.py::test_token_leaves_the_command_line",
}


def chat_template(run):
    folder = run.recipe.model.tokenizer.pretrained_model_name
    with open(f"{folder}/tokenizer_config.json", encoding="utf-8") as file:
        text = file.read()
    try:
        with open(f"{folder}/chat_template.jinja", encoding="utf-8") as file:
            text += file.read()
    except OSError:
        pass
    return text


def cases(kind):
    return COMMON | OWN[kind]


ALL = [pytest.param(kind, flag, id=f"{kind}{flag}") for kind in SCRIPTS for flag in cases(kind)]


@pytest.fixture(scope="module")
def plain():
    """The runs without any flag, kept."""
    return {}


@pytest.mark.parametrize("kind, flag", ALL)
def test_flag(build, plain, kind, flag):
    words, expected = cases(kind)[flag]
    if isinstance(expected, tuple):
        with pytest.raises(Refused) as error:
            build(kind, words)
        assert expected[1] in str(error.value)
        return
    assert expected(build(kind, words))
    if flag in ("--dataset_path", "--nemo_model"):  # always there
        return
    if kind not in plain:
        plain[kind] = build(kind, "")
    try:
        without = expected(plain[kind])
    except (AttributeError, TypeError, ValueError):
        without = False
    assert not without, "also true without the flag: this case can't fail"


@pytest.mark.parametrize("kind", SCRIPTS)
def test_every_flag_has_a_case(kind, load_script):
    flags = {flag for flag in parser_of(load_script(SCRIPTS[kind]))._option_string_actions if flag.startswith("--")}
    assert flags - {"--help"} == set(cases(kind)) | set(ELSEWHERE)
    for where in ELSEWHERE.values():
        file, test = where.split("::")
        assert f"def {test}(" in (ROOT / "tests" / file).read_text(encoding="utf-8")


def test_from_scratch(build):
    """--hf_model_id without --nemo_model: the shape, and random weights."""
    base = BASE["pretrain"].replace("--nemo_model nemo_ckpt/tiny", "--hf_model_id hf_model/tiny")
    run = build("pretrain", "", base)
    assert run.recipe.resume.restore_config is None and run.recipe.model.config.hidden_size == 128


@pytest.mark.parametrize(
    "words, sizes",
    [
        ("--num_gpus 2 --expert_model_parallel_size 2", (2, 1)),
        ("--num_gpus 4 -T 2 --expert_model_parallel_size 2 --expert_tensor_parallel_size 2", (2, 2)),
        ("--num_gpus 2 -T 2 --expert_tensor_parallel_size 1", (1, 1)),
        ("--num_gpus 2 -T 2", (1, None)),
    ],
)
def test_experts(build, words, sizes):
    base = BASE["pretrain"].replace("--nemo_model nemo_ckpt/tiny", "--hf_model_id hf_model/experts")
    strategy = build("pretrain", words, base).recipe.trainer.strategy
    assert (strategy.expert_model_parallel_size, strategy.expert_tensor_parallel_size) == sizes


@pytest.mark.parametrize("name", ("delayed_scaling", "current_scaling", "subchannel_scaling", "mxfp8"))
def test_fp8_recipes(build, name):
    nemo = {"delayed_scaling": "delayed", "current_scaling": "tensorwise", "subchannel_scaling": "blockwise"}
    plugin = build("pretrain", f"--fp8 --fp8_recipe {name}").recipe.trainer.plugins
    assert plugin.fp8_recipe == nemo.get(name, name)


@pytest.mark.parametrize("decay", ("cosine", "linear", "wsd", "constant"))
@pytest.mark.parametrize("steps, warmup, more", [(20, 2, ""), (37, 0, ""), (1000, 100, ""), (7, 1, " -g 4")])
def test_the_real_scheduler(build, decay, steps, warmup, more):
    """Every step's learning rate of NeMo's scheduler, built from the recipe, is what the plan says."""
    import fiddle as fdl
    import torch

    from nemo_tutorial import schedule

    run = build("pretrain", f"--lr 3e-4 --lr_decay {decay} --max_steps {steps} --warmup_steps {warmup}{more}")
    args = run.args
    module = fdl.build(run.recipe.optim.lr_scheduler)
    module.max_steps = steps  # as NeMo's strategy does
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=args.lr)
    scheduler = module.scheduler(None, optimizer)["lr_scheduler"]["scheduler"]
    for step in range(steps):
        expected = schedule.learning_rate(
            step, args.lr, args.min_lr, args.warmup_steps, steps, decay, args.lr_wsd_decay_steps
        )
        assert optimizer.param_groups[0]["lr"] == pytest.approx(expected, rel=1e-9), step
        optimizer.step()
        scheduler.step()
