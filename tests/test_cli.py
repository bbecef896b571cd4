"""Every script's command line: its flags, its help, its errors, and that none of them costs more than a moment."""

import json
import os
import resource
import subprocess
import sys

import pytest
from conftest import ROOT

from nemo_tutorial import arguments

SECONDS = 0.3  # for --help and for any mistake
HEAVY = ("torch", "nemo", "nemo_run", "numpy", "transformers", "megatron", "lightning", "datasets", "safetensors")
TRAINING = """
    --executor -E --experiment -N --num_nodes -G --num_gpus --accelerator -a --account -p --partition
    -i --container_image --time --dry_run
    --check_network --no_check_network --qos --gres --mem --exclusive --no_exclusive --constraint --nodelist --container
    --mount --setup --env --srun_arg --sbatch_arg --wait --chain --save_before
    -M --model_size --hf_model_id --hf_token -n --nemo_model -s --seq_length --trust_checkpoint
    --max_steps --exit_interval -g --global_batch_size -m --micro_batch_size --lr --min_lr --warmup_steps
    --val_check_interval --limit_val_batches --save_top_k --seed --num_workers --precision --fp8 --fp8_recipe
    --performance --keep_optimizer --fresh --allow_change --hang_timeout --max_restarts --max_loss_spike
    -T --tensor_model_parallel_size -P --pipeline_model_parallel_size -C --context_parallel_size
    --expert_model_parallel_size --sequence_parallel --no_sequence_parallel -D --dataset_path
    --config --lr_decay --lr_wsd_decay_steps --save_interval --early_stopping_patience
    --gpu_memory --recompute --recompute_modules --recompute_method --recompute_num_layers
    --use_precision_aware_optimizer --exp_avg_dtype --exp_avg_sq_dtype --main_params_dtype --main_grads_dtype
    --virtual_pipeline_model_parallel_size --expert_tensor_parallel_size
    --log_interval --generate_prompts --generate_tokens
    --wandb --wandb_project --wandb_name --wandb_token --mlflow
"""
# Frozen: a flag may be added here, never taken away or renamed.
FLAGS = {
    "convert_ckpt/convert_from_hf_to_nemo.py": """
        --source --revision --output_path --overwrite --verify --trust_remote_code --dry_run
    """,
    "convert_ckpt/convert_from_nemo_to_hf.py": """
        --source --output_path --overwrite --adapter_only --dtype --max_shard_size --verify --push_to_hub --private
        --trust_checkpoint --dry_run
    """,
    "data/download_pretrain_data.py": """
        --dataset --subset --split --revision --text_column --limit --output_path --overwrite --dry_run
    """,
    "data/make_tiny_model.py": """
        --output_path --overwrite --vocab_size --hidden_size --intermediate_size --num_hidden_layers
        --num_attention_heads --num_key_value_heads --max_position_embeddings --tie_word_embeddings --seed
    """,
    "data/preprocess_data_for_megatron.py": """
        --input --json_keys --output_prefix --tokenizer_type --tokenizer_library --dataset_impl --append_eod
        --add_bos --on_error --workers --overwrite --dry_run
    """,
    "finetuning/download_split_data.py": """
        --dataset --subset --split --revision --ratios --seed --output_path --overwrite --dry_run
    """,
    "finetuning/finetune.py": TRAINING
    + """
        --prompt_template --system_prompt --packing --no_packing --packed_sequence_size --overlong --show_samples
        --peft --lora_rank --lora_alpha --lora_dropout --lora_target_modules
    """,
    "finetuning/generate.py": """
        --model --prompt --questions --system_prompt --limit --max_new_tokens --trust_remote_code --output_path
    """,
    "finetuning/merge_lora.py": "--source --base --output_path --overwrite --trust_checkpoint --dry_run",
    "pretraining/pretrain.py": TRAINING + "--split",
}
TRAINING_SCRIPTS = ("pretraining/pretrain.py", "finetuning/finetune.py")
# A command that can't work: an impossible layout where there is one, else an input or output that can't be.
IMPOSSIBLE = {
    "convert_ckpt/convert_from_hf_to_nemo.py": ["--source", "no-such-folder", "--output_path", "out"],
    "convert_ckpt/convert_from_nemo_to_hf.py": ["--source", "no-such-folder", "--output_path", "out"],
    "data/download_pretrain_data.py": ["--output_path", str(ROOT / "LICENSE")],
    "data/make_tiny_model.py": ["--output_path", "out", "--num_attention_heads", "3"],
    "data/preprocess_data_for_megatron.py": [
        "--input",
        "no-such-file",
        "--output_prefix",
        "x",
        "--tokenizer_type",
        "-",
    ],
    "finetuning/download_split_data.py": ["--ratios", "1,2", "--output_path", "out"],
    "finetuning/finetune.py": ["-D", "no-such-folder", "-N", "1", "-G", "8", "-T", "3", "--dry_run"],
    "finetuning/generate.py": ["--model", "no-such-folder", "--prompt", "?"],
    "finetuning/merge_lora.py": ["--source", "no-such-folder", "--output_path", "out"],
    "pretraining/pretrain.py": ["-D", "no-such-folder", "-N", "1", "-G", "8", "-T", "3", "--dry_run"],
}
MISSPELT = {
    "convert_ckpt/convert_from_hf_to_nemo.py": ("--sorce", "--source"),  # a required one, so missing too
    "convert_ckpt/convert_from_nemo_to_hf.py": ("--output-pth", "--output_path"),
    "data/download_pretrain_data.py": ("--text_colum", "--text_column"),
    "data/make_tiny_model.py": ("--vocabsize", "--vocab_size"),
    "data/preprocess_data_for_megatron.py": ("--append-eos", "--append_eod"),
    "finetuning/download_split_data.py": ("--ratio", "--ratios"),
    "finetuning/finetune.py": ("--datset_path", "--dataset_path"),
    "finetuning/generate.py": ("--max_tokens", "--max_new_tokens"),
    "finetuning/merge_lora.py": ("--overwrit", "--overwrite"),
    "pretraining/pretrain.py": ("--max-stps=5", "--max_steps"),
}
every_script = pytest.mark.parametrize("script", sorted(FLAGS))
training_scripts = pytest.mark.parametrize("script", TRAINING_SCRIPTS)


def call(script, argv, cwd=ROOT):
    """Run a script: the finished process, and the seconds that it computed for, whatever else ran here."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, ROOT / script, *argv], cwd=cwd, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return done, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def quick(script, argv, cwd=ROOT, tries=10):
    """Run a script until it is quick (other work on the machine slows a try), and check that it is."""
    for _ in range(tries):
        done, took = call(script, argv, cwd)
        if took <= SECONDS:
            return done
    raise AssertionError(f"{script} {' '.join(argv)} took {took:.2f} s, {tries} times more than {SECONDS}")


def parser_of(module):
    """The parser that a script's parse_args builds."""

    class Built(Exception):
        pass

    def stop(self, argv=None):
        raise Built(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arguments.Parser, "parse_args", stop)
        try:
            module.parse_args([])
        except Built as built:
            return built.args[0]


def test_all_scripts_are_listed():
    folders = ("convert_ckpt", "data", "pretraining", "finetuning")
    assert {str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).glob("*.py")} == set(
        FLAGS
    ) | {"finetuning/generate.py"}


@every_script
def test_flags_are_frozen(script, load_script):
    parser = parser_of(load_script(script))
    assert set(parser._option_string_actions) == {"-h", "--help", *FLAGS[script].split()}


@every_script
@pytest.mark.parametrize("cwd", ["/", ROOT], ids=["from /", "from the root"])
def test_help(script, cwd, load_script):
    done = quick(script, ["--help"], cwd)
    assert (done.returncode, done.stderr) == (0, "")
    assert load_script(script).__doc__.splitlines()[0] in done.stdout
    assert all(flag in done.stdout for flag in FLAGS[script].split())


@every_script
def test_misspelt_flag_names_the_right_one(script):
    wrong, right = MISSPELT[script]
    done = quick(script, [wrong, "x"] if "=" not in wrong else [wrong])
    assert done.returncode == 2
    assert f"did you mean {right}?" in done.stderr and f"python {ROOT / script} --help" in done.stderr
    assert "Traceback" not in done.stderr and done.stdout == ""


@every_script
def test_impossible_command_is_refused_at_once(script, tmp_path):
    done = quick(script, IMPOSSIBLE[script], tmp_path)
    assert done.returncode == 2
    assert "nothing was started" in done.stderr and "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"
    if script in TRAINING_SCRIPTS:
        assert "--tensor_model_parallel_size 3" in done.stderr and "8 GPUs" in done.stderr


@every_script
def test_nothing_heavy_is_imported(script, tmp_path):
    # One process a script, so that this stays cheap: the three ways in, one after another.
    code = (
        "import contextlib, io, json, runpy, sys\n"
        "script, runs = sys.argv[1], json.loads(sys.argv[2])\n"
        "for argv in runs:\n"
        "    sys.argv = [script, *argv]\n"
        "    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):\n"
        "        try:\n"
        "            runpy.run_path(script, run_name='__main__')\n"
        "        except SystemExit:\n"
        "            pass\n"
        "print(*sys.modules)\n"
    )
    runs = [["--help"], [MISSPELT[script][0]], IMPOSSIBLE[script]]
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / script), json.dumps(runs)], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert "nemo_tutorial.arguments" in loaded
    assert not loaded & set(HEAVY)


@training_scripts
def test_tutorials_short_flags(script, load_script):
    args = load_script(script).parse_args(
        "-E name -N 2 -G 4 -M 8B -n nemo_ckpt/x -s 4096 -g 64 -m 2 -T 2 -P 3 -C 4 -D data/x -a acc -p part "
        "-i img".split()
    )
    long = load_script(script).parse_args(
        "--experiment name --num_nodes 2 --num_gpus 4 --model_size 8B --nemo_model nemo_ckpt/x --seq_length 4096 "
        "--global_batch_size 64 --micro_batch_size 2 --tensor_model_parallel_size 2 --pipeline_model_parallel_size 3 "
        "--context_parallel_size 4 --dataset_path data/x --account acc --partition part --container_image img".split()
    )
    assert vars(args) == vars(long)
    assert (args.num_nodes, args.num_gpus, args.context_parallel_size, args.container_image) == (2, 4, 4, "img")


@training_scripts
@pytest.mark.parametrize(
    "argv", [["--max-steps", "7"], ["--max_steps", "7"], ["--max-steps=7"], ["--max_steps=7"]], ids=" ".join
)
def test_dash_and_underscore_are_alike(script, argv, load_script):
    assert load_script(script).parse_args(["-D", "data/some-name", *argv]).max_steps == 7


def test_dashes_in_values_stay(load_script):
    args = load_script("pretraining/pretrain.py").parse_args(["--dataset-path=data/a-b", "--experiment", "c-d"])
    assert (args.dataset_path, args.experiment) == (["data/a-b"], "c-d")


@training_scripts
@pytest.mark.parametrize(
    ("argv", "value"),
    [
        ([], None),
        (["--sequence-parallel"], True),
        (["--no-sequence-parallel"], False),
        (["--no_sequence_parallel"], False),
    ],
)
def test_sequence_parallel_on_and_off(script, argv, value, load_script):
    assert load_script(script).parse_args(["-D", "x", *argv]).sequence_parallel is value


REQUIRED = {
    "convert_ckpt/convert_from_hf_to_nemo.py": ["--source", "s", "--output_path", "o"],
    "convert_ckpt/convert_from_nemo_to_hf.py": ["--source", "s", "--output_path", "o"],
    "data/download_pretrain_data.py": [],
    "data/make_tiny_model.py": ["--output_path", "o"],
    "data/preprocess_data_for_megatron.py": ["--input", "i", "--output_prefix", "o", "--tokenizer_type", "t"],
    "finetuning/download_split_data.py": [],
    "finetuning/merge_lora.py": ["--source", "s", "--output_path", "o"],
}


@pytest.mark.parametrize("script", REQUIRED)
def test_overwrite_takes_no_value(script, load_script, capsys):
    parse = load_script(script).parse_args
    assert parse([*REQUIRED[script], "--overwrite"]).overwrite is True
    assert parse(REQUIRED[script]).overwrite is False
    for value in (["--overwrite", "true"], ["--overwrite=true"]):
        with pytest.raises(SystemExit) as stop:
            parse([*REQUIRED[script], *value])
        assert stop.value.code == 2 and "true" in capsys.readouterr().err


@training_scripts
@pytest.mark.parametrize("argv", ["--max_steps 0", "--max_steps -3", "--num_gpus 1.5", "--executor slrm", "--lr fast"])
def test_values_that_are_none(script, argv, load_script, capsys):
    with pytest.raises(SystemExit) as stop:
        load_script(script).parse_args(["-D", "x", *argv.split()])
    flag, value = argv.split()
    error = capsys.readouterr().err
    assert stop.value.code == 2 and flag in error and value in error


@training_scripts
def test_whole_names_only(script, load_script, capsys):
    """An abbreviation that means one flag today may mean another tomorrow."""
    with pytest.raises(SystemExit):
        load_script(script).parse_args(["-D", "x", "--max", "5"])
    assert "--max is not a flag" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--hf_token", "hf_secret"], ["--hf-token=hf_secret"]], ids=" ".join)
def test_token_leaves_the_command_line(argv, load_script, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(os, "execv", lambda path, words: seen.append(words))
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "-D", "x", *argv, "--wandb-token", "w_secret", "-E", "name"])
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "before")
    load_script("pretraining/pretrain.py").parse_args()
    assert seen == [[sys.executable, "pretrain.py", "-D", "x", "-E", "name"]]
    assert (os.environ["HF_TOKEN"], os.environ["WANDB_API_KEY"]) == ("hf_secret", "w_secret")
    error = capsys.readouterr().err
    assert "export HF_TOKEN=" in error and "export WANDB_API_KEY=" in error and "secret" not in error


def test_token_is_in_no_process_list(tmp_path):
    """A real process: the token is gone from the command line that everyone can read, and is in the environment."""
    file = tmp_path / "asks_itself.py"
    file.write_text(
        "import os\n"
        "from nemo_tutorial import arguments\n"
        "parser = arguments.Parser('')\n"
        "arguments.add_model(parser)\n"
        "args = parser.parse_args()\n"
        "command = open('/proc/self/cmdline').read().split(chr(0))\n"
        "print(command, os.environ['HF_TOKEN'], args.hf_token, args.model_size)\n"
    )
    command = [sys.executable, file, "--hf_token", "hf_canary", "--model_size", "8B"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    line = f"[{sys.executable!r}, {str(file)!r}, '--model_size', '8B', ''] hf_canary None 8B"
    assert done.stdout.strip() == line


@training_scripts
def test_bare_nemo_model(script, load_script):
    """The tutorial's `NEMO_MODEL= # [Optional]` leaves the flag without a value."""
    args = load_script(script).parse_args(["--nemo_model", "--max_steps", "5", "-D", "x"])
    assert args.nemo_model == ""
    assert load_script(script).parse_args(["-D", "x"]).nemo_model is None
