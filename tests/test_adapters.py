"""LoRA and DoRA of every family: what NeMo computes with the adapter, the merged model and `peft` compute too."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import triton_interpreter
from conftest import ROOT, script, touching
from test_families import CASES, make_model

from nemo_tutorial import checkpoints, models

pytestmark = pytest.mark.nemo
FLOAT32 = {"dtype": "float32"}
LORA = (
    *("llama3.2", "llama-head_dim", "qwen2", "qwen3", "mistral-nemo", "phi3-partial", "gemma", "nemotron"),
    *("gemma2-float32", "mixtral", "qwen3moe"),
)
DORA = ("llama3.2", "phi3-partial", "nemotron")


def nemo_logits(model, tokens):
    import torch

    length = tokens.shape[1]
    mask = torch.ones(length, length).tril().logical_not()[None, None]
    with torch.no_grad():
        return model.eval()(tokens, torch.arange(length)[None], attention_mask=mask)


def make_adapter(base, output, scheme, tokens):
    """Save an adapter of random values as NeMo does; the logits of NeMo's model without it and with it."""
    import torch
    from megatron.core import dist_checkpointing
    from nemo.lightning import io
    from nemo.lightning.io.pl import TrainerContext

    from nemo_tutorial import conversion

    model, trainer = conversion.exporter(base).nemo_load(base, conversion.alone(**conversion.LOADING))
    before = nemo_logits(model, tokens)
    model.trainer = trainer
    scheme(model)
    torch.manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                parameter.copy_(
                    torch.rand_like(parameter) + 0.5 if "magnitude" in name else torch.randn_like(parameter) / 8
                )
    after = nemo_logits(model, tokens)
    state = trainer.strategy.megatron_parallel.sharded_state_dict()
    (output / "weights").mkdir(parents=True)
    dist_checkpointing.save(
        {name: value for name, value in state.items() if ".adapter." in name},
        str(output / "weights"),
        content_metadata=trainer.strategy.sharded_state_dict_metadata,
    )
    (output / "weights/adapter_metadata.json").write_text(json.dumps({"model_ckpt_path": str(base)}))
    model.model_transform, model.__io__.model_transform = scheme, scheme.__io__
    TrainerContext.from_trainer(trainer).io_dump(output / "context", yaml_attrs=["model"])
    assert io.load_context(output / "context", subpath="model.model_transform").dim == scheme.dim
    return before, after


@pytest.fixture
def adapted(stages, tmp_path):
    """adapted(case, scheme): (Hugging Face folder, NeMo checkpoint, adapter, prompt, logits before, after)."""
    import torch

    from nemo_tutorial import conversion

    def make(case, kind, **fields):
        from nemo.collections.llm import peft

        family, own = CASES[case]
        source, base, adapter = (tmp_path / name for name in ("source", "base", "adapter"))
        make_model(source, family, own | FLOAT32 | fields, stages / "hf_model/tiny")
        conversion.import_model(source, models.from_hf(source), base)
        checkpoints.write_manifest(base, folder=str(source))
        tokens = torch.randint(3, 2000, (1, 24), generator=torch.Generator().manual_seed(3))
        inside = models.NORM_INSIDE.get(f"{family}ForCausalLM", ())
        targets = [name for name in models.LINEAR if name not in inside]
        scheme = getattr(peft, kind)(dim=4, alpha=12, target_modules=targets)
        before, after = make_adapter(base, adapter, scheme, tokens)
        return source, base, adapter, tokens, before, after

    return make


def agree(ours, theirs, spread):
    return (ours - theirs).abs().max().item() < 1e-3 * spread


@pytest.mark.parametrize("case, kind", [(case, "LoRA") for case in LORA] + [(case, "DoRA") for case in DORA])
def test_adapter_merged_and_in_peft(adapted, tmp_path, case, kind):
    """NeMo with the adapter, transformers with the merged weights, transformers with peft: the same logits."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from nemo_tutorial import adapters, conversion

    source, base, adapter, tokens, before, after = adapted(case, kind)
    spread = after.std().item()
    assert (after - before).abs().max() > 0.3 * spread  # the adapter matters
    with touching("/tmp/nemo_tokenizer") as touched:  # where stock NeMo's merge puts everyone's tokenizer
        adapters.merge(adapter, base, tmp_path / "merged")
    assert touched == []
    conversion.export(tmp_path / "merged", tmp_path / "hf")
    adapters.export(adapter, tmp_path / "peft", *checkpoints.hugging_face_base(adapter))
    how = {"dtype": "auto", "attn_implementation": "eager"}  # the others leave out Gemma 2's soft caps
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", **how)(tokens).logits
        plain = AutoModelForCausalLM.from_pretrained(source, **how)
        unadapted = plain(tokens).logits
        model = PeftModel.from_pretrained(plain, tmp_path / "peft", autocast_adapter_dtype=False)
        unmerged = model.eval()(tokens).logits
    before, after = (logits[..., : merged.shape[-1]] for logits in (before, after))
    assert agree(unadapted, before, spread)
    assert agree(merged, after, spread)
    assert agree(unmerged, after, spread)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(source) and config["use_dora"] == (kind == "DoRA")
    assert not (tmp_path / "peft/config.json").exists() and (tmp_path / "peft/tokenizer.json").is_file()


@pytest.fixture
def logits_and_gradients(adapted):
    """make(case, targets) -> a NeMo model with adapters of random values, and a function: its logits and gradients."""
    import torch
    from nemo.collections import llm

    from nemo_tutorial import conversion

    def make(case, targets=models.LINEAR):
        _, base, _, tokens, *_ = adapted(case, "LoRA")
        model, trainer = conversion.exporter(base).nemo_load(base, conversion.alone(**conversion.LOADING))
        model.trainer = trainer
        llm.peft.LoRA(dim=4, alpha=12, dropout=0.0, target_modules=list(targets))(model)
        torch.manual_seed(2)
        for name, parameter in model.named_parameters():
            if ".adapter." in name:
                torch.nn.init.normal_(parameter, std=1 / 8).requires_grad_()
        mask = torch.ones(24, 24).tril().logical_not()[None, None]
        assert model.config.params_dtype == torch.float32

        def run():
            model.zero_grad()
            logits = model(tokens, torch.arange(24)[None], attention_mask=mask)
            logits.square().mean().backward()
            return logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

        return model, run

    return make


def assert_near(ours, theirs):
    (found, gradients), (expected, wanted) = ours, theirs
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert gradients.keys() == wanted.keys() and all(".adapter." in name for name in gradients)
    for name, gradient in wanted.items():
        assert (gradients[name] - gradient).abs().max() < 1e-4 * gradient.abs().max() > 0, name


@pytest.mark.parametrize("case", ["llama3.2", "qwen2", "phi3-partial"])
def test_added_in_the_product(logits_and_gradients, monkeypatch, case):
    """lora.py computes what NeMo's own layer does: the logits, and the gradients of every A and B."""
    from nemo.collections.llm.peft.lora import LoRALinear

    from nemo_tutorial import lora

    model, run = logits_and_gradients(case)
    expected = run()
    called = []
    for function in (lora.Down, lora.FrozenAndDown):

        def counted(*args, function=function, apply=function.apply):
            called.append(function)
            return apply(*args)

        monkeypatch.setattr(function, "apply", counted)
    monkeypatch.setattr(LoRALinear, "forward", LoRALinear.forward)  # put back after the test
    lora.AddedInProduct().setup(None, None, "fit")
    found = run()
    assert len(called) == sum(isinstance(module, LoRALinear) for module in model.modules()) > 0
    # Without Transformer Engine no layer has a norm inside it; Qwen 2 has biases.
    assert (lora.Down in called) == (case == "qwen2") and lora.FrozenAndDown in called
    assert_near(found, expected)


@pytest.mark.parametrize("targets", [models.LINEAR, ["linear_fc2"], ["linear_fc1", "linear_proj"]], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_added_by_kernels(logits_and_gradients, monkeypatch, targets, training):
    """lora_kernels.py too, whichever layers have an adapter; its kernels by Triton's stand-in."""
    import torch
    from megatron.core.fusions import fused_bias_dropout
    from megatron.core.transformer.mlp import MLP
    from nemo.collections.llm.peft.lora import LoRALinear

    from nemo_tutorial import lora

    model, run = logits_and_gradients("llama3.2", targets)
    model.train(training)
    expected = run()
    for owner, name in [
        (LoRALinear, "forward"),
        (MLP, "forward"),
        (fused_bias_dropout, "bias_dropout_add_fused_train"),
        (fused_bias_dropout, "bias_dropout_add_fused_inference"),
    ]:
        unfused = fused_bias_dropout.bias_dropout_add_unfused(training)  # the fused one is compiled at its first call
        monkeypatch.setattr(owner, name, unfused if owner is fused_bias_dropout else getattr(owner, name))
    for module in model.modules():
        if hasattr(module, "config"):
            monkeypatch.setattr(module.config, "bias_dropout_fusion", True)
    with triton_interpreter.imported("lora_kernels") as kernels:
        monkeypatch.setattr(kernels, "HALF", [torch.float32])
        triton_interpreter.launched.clear()
        lora.AddedByKernels().setup(None, model, "fit")
        found = run()
    layers, both = model.config.num_layers, {"linear_fc1", "linear_fc2"} <= set(targets)
    last = sum(name in targets for name in ("linear_proj", "linear_fc2"))
    assert len(triton_interpreter.launched) == layers * (last + 2 * both)
    assert_near(found, expected)


def on_ranks(device, **environment):
    """What adapters_on_ranks.py prints, of two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "tests/adapters_on_ranks.py"), device]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_split_by_sequence():
    """Between two processes: the output and all gradients are the whole's, by NeMo's way and by ours."""
    for rank in on_ranks("cpu", CUDA_VISIBLE_DEVICES=""):
        for layer, ways in rank.items():
            for way, errors in ways.items():
                assert max(errors.values()) < 1e-5, (layer, way, errors)


def test_an_adapter_gathers_what_its_norm_gives_it(monkeypatch):
    """Once, where NeMo has had Transformer Engine gather it; other layers are left as they are."""
    from nemo_tutorial import lora

    monkeypatch.setattr(lora, "STOCK_BASE", lambda self, x: (self.to_wrap.seen(), x))

    def layer(**attributes):
        base = SimpleNamespace(**attributes)
        base.seen = lambda: getattr(base, "return_layernorm_output_gathered", False)
        return SimpleNamespace(to_wrap=base, adapter=SimpleNamespace(disable_sequence_parallel_comm=True))

    name = "return_layernorm_output_gathered"
    gathered, own, other = layer(**{name: True}), layer(**{name: False}), layer()
    for wrapped in (gathered, own, other, gathered):
        assert not lora.base_linear_forward(wrapped, "x")[0]
    disabled = [wrapped.adapter.disable_sequence_parallel_comm for wrapped in (gathered, own, other)]
    assert disabled == [False, True, True]


@pytest.mark.parametrize(
    "flags, there", [("-T 2 --num_gpus 2", True), ("-T 2 --num_gpus 2 --no_sequence_parallel", False), ("", False)]
)
@pytest.mark.parametrize("performance", ["auto", "off"])
def test_no_gradient_of_an_input_is_lost(build, flags, there, performance):
    """Whatever --performance says; of all weights there is none to lose."""
    import fiddle as fdl

    for peft in ("--peft lora", ""):
        recipe = build("finetune", f"{flags} {peft} --performance {performance}").recipe
        names = [fdl.get_callable(callback).__name__ for callback in recipe.trainer.callbacks]
        assert ("GradientsOfInputs" in names) == (there and bool(peft))
        assert ("SplitBySequence" in names) == (there and bool(peft) and performance == "auto")


def test_dora_with_biases_is_merged_and_not_exported(adapted, tmp_path):
    """NeMo's DoRA scales Qwen 2's biases, peft's does not: the merged model does too, an adapter is refused by name."""
    import torch
    from transformers import AutoModelForCausalLM

    from nemo_tutorial import adapters, conversion

    _, base, adapter, tokens, _, after = adapted("qwen2", "DoRA")
    adapters.merge(adapter, base, tmp_path / "merged")
    conversion.export(tmp_path / "merged", tmp_path / "hf")
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype="auto")(tokens).logits
    assert agree(merged, after[..., : merged.shape[-1]], after.std().item())
    with pytest.raises(ValueError, match="the bias of model.layers.0.self_attn.q_proj"):
        adapters.export(adapter, tmp_path / "peft", None)


def test_merged_as_stock_nemo_does(adapted, tmp_path):
    """In bfloat16, the same as NeMo's own merge, but for the rounding of its intermediate sums."""
    from nemo.collections import llm
    from test_conversion import nemo_tensors

    from nemo_tutorial import adapters

    _, base, adapter, *_ = adapted("llama3", "LoRA", dtype="bfloat16")
    adapters.merge(adapter, base, tmp_path / "merged")
    with touching("/tmp/nemo_tokenizer") as touched:
        llm.peft.merge_lora(str(adapter), str(tmp_path / "stock"))
    assert touched  # so that it would be seen
    ours, stock = nemo_tensors(tmp_path / "merged"), nemo_tensors(tmp_path / "stock")
    assert ours.keys() == stock.keys()
    for name, tensor in stock.items():
        assert ours[name].dtype == tensor.dtype
        assert (ours[name].float() - tensor.float()).abs().max() <= 0.01 * tensor.float().abs().max(), name


def test_other_adapters_are_refused(adapted, tmp_path, monkeypatch):
    from nemo_tutorial import adapters

    _, base, adapter, *_ = adapted("llama3", "LoRA")
    monkeypatch.setitem(models.NORM_INSIDE, "LlamaForCausalLM", ("linear_proj", "linear_fc2"))
    with pytest.raises(ValueError, match="adapts linear_fc2, linear_proj"):
        adapters.Adapter(adapter)
    monkeypatch.undo()
    other = Path(shutil.copytree(adapter, tmp_path / "canonical"))
    file = other / "context/io.json"
    file.write_text(file.read_text().replace('"LoRA"', '"CanonicalLoRA"').replace("peft.lora", "peft.canonical_lora"))
    with pytest.raises(ValueError, match="holds a CanonicalLoRA adapter"):
        adapters.Adapter(other)


def test_dora_with_tensor_parallelism_is_refused(adapted, monkeypatch):
    from nemo_tutorial import adapters, weights

    *_, adapter, _, _, _ = adapted("llama3", "DoRA")
    adapters.Adapter(adapter)
    monkeypatch.setattr(weights.Megatron, "pieces", lambda self, name: 2)  # as saved by two ranks
    with pytest.raises(ValueError, match="with tensor parallelism.*--tensor_model_parallel_size 1"):
        adapters.Adapter(adapter)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_rows_of_a_layer_that_is_not_gated(ranks):
    """Nemotron's B of linear_fc1, as Megatron's own function lays out the ranks' parts in a checkpoint."""
    import torch
    from megatron.core.dist_checkpointing import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    from nemo_tutorial import adapters

    whole = torch.randn(24, 3)
    saved = torch.zeros_like(whole)
    for rank, part in enumerate(whole.chunk(ranks)):
        sharded = ShardedTensor.from_rank_offsets("B", part, (0, rank, ranks))
        for half in apply_swiglu_sharded_factory(sharded, ()).build():
            start = half.global_offset[0]
            saved[start : start + half.local_shape[0]] = half.data

    class Saved(dict):
        def pieces(self, name):
            return 2 * ranks

    adapter = object.__new__(adapters.Adapter)
    adapter.family = next(family for family in models.FAMILIES if not family.gated)
    adapter.weights = Saved({f"mlp.linear_fc1.adapter.{adapters.B}": saved})
    assert adapter.part("mlp.linear_fc1", adapters.B).equal(whole)


def test_a_run_from_beginning_to_end(stages, tmp_path):
    """finetune.py --peft lora; merged, exported, and as an adapter from the run's folder, by the scripts."""
    import torch
    from peft import AutoPeftModelForCausalLM
    from transformers import AutoModelForCausalLM

    data = ["--dataset", ROOT / "data/sample/instructions.jsonl", "--ratios", "90,8,2"]
    script(tmp_path, "finetuning/download_split_data.py", *data)
    (tmp_path / "hf_model").symlink_to(stages / "hf_model")
    script(tmp_path, "convert_ckpt/convert_from_hf_to_nemo.py", "--source", "hf_model/tiny", "--output_path", "nemo")
    script(
        tmp_path,
        "finetuning/finetune.py",
        *("--experiment", "lora", "--peft", "lora", "--nemo_model", "nemo", "--dataset_path", "data/alpaca"),
        *("--seq_length", 128, "--global_batch_size", 8, "--micro_batch_size", 4, "--num_workers", 0),
        *("--max_steps", 4, "--lr", "1e-2"),
    )
    source = checkpoints.latest(tmp_path / "results/lora")
    export = "convert_ckpt/convert_from_nemo_to_hf.py"
    script(tmp_path, "finetuning/merge_lora.py", "--source", source, "--output_path", "merged")
    script(tmp_path, export, "--source", "merged", "--output_path", "hf", "--max_shard_size", "1MB")
    said = script(tmp_path, export, "--source", "results/lora", "--output_path", "peft", "--adapter_only").stdout
    assert "of 14 layers" in said and "28 read back and compared: all bit-equal" in said
    tokens = torch.arange(3, 40)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)(tokens).logits
        unmerged = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "peft", dtype=torch.float32)(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(stages / "hf_model/tiny", dtype=torch.float32)(tokens).logits
    assert (merged - unmerged).abs().max() < 0.05 * (merged - base).abs().max()
