"""--config FILE, KEY=VALUE at a command's end, and a whole recipe that is printed and fed back."""

import json

import pytest
import yaml
from building import Refused

SCRIPT = "pretraining/pretrain.py"


@pytest.fixture
def parse(load_script, tmp_path, capsys):
    """Parse a command, {FILE} standing for a file with `content`; a refused one raises Refused with its message."""

    def run(words, content="", script=SCRIPT):
        file = tmp_path / "run.yaml"
        file.write_text(content if isinstance(content, str) else yaml.safe_dump(content), encoding="utf-8")
        try:
            return load_script(script).parse_args([word.replace("{FILE}", str(file)) for word in words.split()])
        except SystemExit as stop:
            assert stop.code == 2
            raise Refused(capsys.readouterr().err) from None

    return run


def test_a_file_and_flags_over_it(parse):
    content = {"dataset_path": ["a", "b"], "max_steps": 7, "lr": "1e-4", "fp8": True, "micro-batch-size": 2}
    args = parse("--config {FILE} --max_steps 9", content)
    assert (args.dataset_path, args.max_steps, args.lr, args.fp8) == (["a", "b"], 9, 1e-4, True)
    assert args.micro_batch_size == 2
    slurm = {"dataset_path": "x", "srun_arg": ["--cpu-bind=cores", "-K"], "setup": "module load x"}
    args = parse("--config {FILE}", slurm)
    assert (args.srun_arg, args.setup) == (["--cpu-bind=cores", "-K"], ["module load x"])
    assert parse("--max_steps 9 --config={FILE} -D c", content).dataset_path == ["c"]
    assert vars(parse("--config {FILE}", content)).keys() == vars(parse("-D x")).keys()


def test_the_same_checks_as_on_the_command_line(parse):
    for content, message in (
        ({"max_stps": 5}, "max_stps is not a flag of"),
        ({"max_stps": 5}, "did you mean max_steps?"),
        ({"dataset_path": "x", "max_steps": "many"}, "argument --max_steps: 'many' is not a whole number above 0"),
        ({"hf_token": "hf_x"}, "hf_token would lie open in a file"),
        ("max_steps: [", "can't be read as YAML"),
        ("- max_steps", "holds no flags"),
        ({"max_steps": 3}, "the following arguments are required: -D/--dataset_path"),
    ):
        with pytest.raises(Refused) as error:
            parse("--config {FILE}", content)
        assert message in str(error.value) and "Traceback" not in str(error.value)
    with pytest.raises(Refused, match=r"nowhere.yaml can't be read"):
        parse("--config nowhere.yaml")


def test_every_mistake_of_a_file_at_once(parse):
    with pytest.raises(Refused) as error:
        parse("--config {FILE} trainr.x=1", {"max_stps": 5, "lrr": 1})
    assert "max_stps" in str(error.value) and "lrr" in str(error.value)


@pytest.mark.parametrize("script", ("finetuning/finetune.py", SCRIPT))
def test_off_in_a_file_is_off(parse, script):
    args = parse("--config {FILE}", {"dataset_path": "x", "sequence_parallel": False, "wandb": False}, script)
    assert (args.sequence_parallel, args.wandb) == (False, False)


def test_overrides_that_are_flags_are_those_flags(parse):
    """Last wins: file, flags, the end of the command."""
    content = {"dataset_path": "x", "max_steps": 3, "overrides": ["optim.config.lr=0.1", "trainer.max_steps=4"]}
    args = parse("--config {FILE} --max_steps 5 trainer.max_steps=6 optim.config.weight_decay=0.01", content)
    assert (args.max_steps, args.lr, args.overrides) == (6, 0.1, ["optim.config.weight_decay=0.01"])
    assert parse("--config {FILE}", content).max_steps == 4
    assert parse("--config {FILE} --max_steps 5", content).max_steps == 5
    sizes = parse("-D x trainer.strategy.tensor_model_parallel_size=2 trainer.strategy.sequence_parallel=false")
    assert (sizes.tensor_model_parallel_size, sizes.sequence_parallel) == (2, False)


def test_what_is_an_override_and_what_a_value(parse):
    args = parse("-D data/x trainer.benchmark=True")
    assert (args.dataset_path, args.overrides) == (["data/x"], ["trainer.benchmark=True"])
    args = parse("-D data/x --experiment a.b=5")
    assert (args.experiment, args.overrides) == ("a.b=5", [])
    name = "results/r/checkpoints/model_name=0--val_loss=1.55-step=9-consumed_samples=80.0-last"
    args = parse(f"-D data/x -n {name} trainer.benchmark=True")
    assert (args.nemo_model, args.overrides) == (name, ["trainer.benchmark=True"])
    assert parse(f"-D {name}").dataset_path == [name]
    assert parse("-D x --dry_run trainer.benchmark=True").dry_run == "plan"


@pytest.mark.parametrize(
    "word, message",
    [
        ("trainr.max_steps=5", "the recipe has no trainr; did you mean trainer.max_steps?"),
        ("optimizer.config.lr=5", "did you mean optim.config.lr?"),
        ("trainer.max_steps*=2", "trainer.max_steps is set by --max_steps; write --max_steps with its new value"),
        ("trainer.max_steps=many", "argument --max_steps: 'many' is not a whole number above 0"),
        ("trainer.log_every_n_step=5", "did you mean trainer.log_every_n_steps?"),
        ("optim.config.weightdecay=0.1", "did you mean optim.config.weight_decay?"),
        ("model.config.hidden_dropuot=0.1", "did you mean model.config.hidden_dropout?"),
        ("trainer.strategy.ddp.bucketsize=9", "did you mean trainer.strategy.ddp.bucket_size?"),
        ("log.ckpt.save_weights=True", "log.ckpt has no save_weights"),
        ("data.paths=x", "decided by the flags"),
        ("model.tokenizer.use_fast=False", "decided by the flags"),
    ],
)
def test_what_is_refused_without_nemo(parse, word, message):
    with pytest.raises(Refused) as error:
        parse(f"-D x {word}")
    assert message in str(error.value)


def test_a_whole_recipe_takes_no_flag_that_it_would_not_follow(parse):
    content = {"dataset_path": "x", "max_steps": 3, "recipe": {"_target_": "nemo.collections.llm.pretrain"}}
    with pytest.raises(Refused, match=r"--lr: .*run.yaml holds a whole recipe, which that flag does not change"):
        parse("--config {FILE} --lr 5", content)
    with pytest.raises(Refused, match="--max_steps: .* holds a whole recipe"):
        parse("--config {FILE} trainer.max_steps=4", content)
    args = parse("--config {FILE} --dry_run full --executor slurm trainer.benchmark=True", content)
    assert args.recipe and args.overrides == ["trainer.benchmark=True"] and args.max_steps == 3


@pytest.mark.nemo
def test_changes_of_the_recipe(build):
    """NeMo-Run's syntax: numbers, truth, lists, operations; the last wins."""
    words = (
        "trainer.log_every_n_steps=5 optim.config.weight_decay=0.01 optim.config.weight_decay*=2 "
        "model.config.hidden_dropout=0.5 model.config.hidden_dropout=0.25 trainer.strategy.ddp.bucket_size=1000 "
        "trainer.benchmark=True log.ckpt.save_weights_only=False trainer.callbacks[0].log_tokens_per_sec=True"
    )
    recipe = build("pretrain", words).recipe
    assert (recipe.trainer.log_every_n_steps, recipe.optim.config.weight_decay) == (5, 0.02)
    assert recipe.model.config.hidden_dropout == 0.25 and recipe.trainer.benchmark is True
    assert recipe.trainer.strategy.ddp.bucket_size == 1000 and recipe.log.ckpt.save_weights_only is False
    assert recipe.trainer.callbacks[0].log_tokens_per_sec is True


@pytest.mark.nemo
@pytest.mark.parametrize(
    "word, message",
    [
        ("trainer.strategy.ckpt_async_sav=False", "did you mean trainer.strategy.ckpt_async_save?"),
        ("optim.lr_schedulr.x=0.1", "did you mean optim.lr_scheduler?"),
        ("trainer.callbacks[99].x=1", "trainer.callbacks has no [99]"),
        ("trainer.max_epochs.x=1", "which has no x"),
        ("optim.config.weight_decay=often", "optim.config.weight_decay=often"),
    ],
)
def test_misspelt_changes(build, word, message, capsys):
    with pytest.raises(ValueError) as error:
        build("pretrain", word)
    assert message in str(error.value)


@pytest.mark.nemo
def test_all_misspelt_changes_at_once(build):
    with pytest.raises(ValueError) as error:
        build("pretrain", "trainer.strategy.ckpt_async_sav=False optim.confg.weight_decay=0.1")
    assert "trainer.strategy.ckpt_async_save?" in str(error.value) and "optim.config?" in str(error.value)


@pytest.mark.nemo
@pytest.mark.parametrize(
    "kind, words",
    [
        ("pretrain", "--lr_decay wsd --recompute full --early_stopping_patience 2 optim.config.weight_decay*=2"),
        ("pretrain", "--fp8 --use_precision_aware_optimizer --exp_avg_dtype fp8 --num_gpus 2 -T 2"),
        ("pretrain", "--accelerator cpu --precision fp32 --wandb"),
        ("finetune", "--peft dora --lora_dropout 0.1"),
        ("finetune", "--no_packing --system_prompt Kind."),
    ],
)
def test_a_recipe_is_printed_and_fed_back(build, tmp_path, kind, words):
    """The recipe of the file is the one that was printed, field for field; what is shared in it stays shared."""
    from nemo_tutorial import config, recipes

    first = build(kind, words)
    text = config.text(first.args.written, recipes.as_text(first.recipe))
    file = tmp_path / "run.yaml"
    file.write_text(f"{config.HEAD}flags\n{text}{config.TAIL}", encoding="utf-8")
    again = build(kind, f"--config {file} --dry_run full", base="")
    assert again.args.recipe is not None
    # As text, and not by ==: to Fiddle, one number in two places is another recipe than two equal ones.
    assert recipes.as_text(again.recipe) == recipes.as_text(first.recipe)
    changed = "optim.config.weight_decay" if "weight_decay" in words else "as the flags make it"
    assert f"recipe of {file}\n  {changed}" in again.said.out
    assert again.recipe.data.tokenizer is again.recipe.model.tokenizer
    ignored = ("config", "recipe", "written", "overrides")
    known = {name: value for name, value in vars(first.args).items() if name not in ignored}
    assert known == {name: value for name, value in vars(again.args).items() if name not in ignored}
    changed = build(kind, f"--config {file} --dry_run full optim.config.weight_decay=0.7", base="")
    assert changed.recipe.optim.config.weight_decay == 0.7


@pytest.mark.nemo
def test_a_changed_recipe_in_a_file_is_what_runs(build, tmp_path):
    from nemo_tutorial import config, recipes

    first = build("pretrain", "")
    content = yaml.safe_load(config.text(first.args.written, recipes.as_text(first.recipe)))
    content["recipe"]["optim"]["config"]["adam_beta2"] = 0.5
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(content), encoding="utf-8")  # JSON is YAML
    run = build("pretrain", f"--config {file} --dry_run full", base="")
    assert run.recipe.optim.config.adam_beta2 == 0.5
    assert "optim.config.adam_beta2  0.5, by the flags 0.95" in run.said.out
    content["recipe"]["optim"]["_target_"] = "nemo.lightning.NoSuchOptimizer"
    file.write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(ValueError, match="names nemo.lightning.NoSuchOptimizer, which is not there"):
        build("pretrain", f"--config {file} --dry_run full", base="")
