"""Instruction tuning through the real NeMo on the CPU: packed rows train exactly as they do one by one."""

import json

import pytest
from conftest import on_ranks, own_environment

from nemo_tutorial import preflight

pytestmark = pytest.mark.nemo
LENGTHS = (7, 12, 9)  # of three samples in a pack of 32: its last 4 places are padding
ROWS = [
    {
        "input": f"台灣第 {number} 個問題是什麼？" * (number % 3 + 1),
        "output": f"第 {number} 個答案。" * (number % 4 + 1),
    }
    for number in range(16)
]
LORA = ["--peft", "lora"]
FLAGS = "--nemo_model nemo_ckpt/tiny --dataset_path sixteen --seq_length 128 --precision fp32 --num_workers 0"


@pytest.fixture(scope="module")
def model(stages):
    """The tiny model in NeMo, in fp32, in this process."""
    from nemo_tutorial import conversion, cpu  # noqa: F401  (cpu: Megatron without a GPU)

    trainer = conversion.alone(**conversion.LOADING)
    with own_environment():
        nemo, _ = conversion.exporter(stages / "nemo_ckpt/tiny").nemo_load(stages / "nemo_ckpt/tiny", trainer)
    nemo = nemo.eval().float()
    for module in nemo.modules():
        if hasattr(module, "mask_func"):  # the softmax knows what it was built for
            module.input_in_bf16 = module.input_in_float16 = False
    return nemo


def forward(model, ids, cu_seqlens=None, labels=None):
    """Logits [tokens, vocabulary] of a pack, or of one sample; with `labels` [tokens], the loss of each token."""
    import torch
    from megatron.core.packed_seq_params import PackedSeqParams

    params, length = {}, len(ids)
    mask = torch.ones(length, length).tril().logical_not()[None, None]
    if cu_seqlens:
        ends = torch.tensor(cu_seqlens, dtype=torch.int32)
        longest = (ends[1:] - ends[:-1]).max()
        params["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
        mask = torch.tensor([1])  # what NeMo's packed dataset gives
    labels = None if labels is None else torch.tensor([labels])
    with torch.no_grad():
        out = model(torch.tensor([ids]), torch.arange(length)[None], attention_mask=mask, labels=labels, **params)
    return out.squeeze(0) if labels is None else out.view(-1)


@pytest.fixture(params=[None, (3, 0)], ids=["", "window"])
def window(request, model):
    """Attention in full, and to the last four tokens only, as Mistral's first version has it."""
    softmaxes = [
        module for module in model.modules() if hasattr(module, "window_size") and hasattr(module, "mask_func")
    ]
    assert softmaxes
    for softmax in softmaxes:
        softmax.window_size = request.param
    yield
    for softmax in softmaxes:
        softmax.window_size = None


def pack():
    import torch

    torch.manual_seed(0)
    samples = [torch.randint(0, 2000, (length + 1,)).tolist() for length in LENGTHS]
    ends = [0, 7, 19, 28, 32]
    ids = [token for sample in samples for token in sample[:-1]] + [0] * 4
    labels = [token for sample in samples for token in sample[1:]] + [0] * 4
    return samples, ids, labels, ends


def test_a_changed_sample_leaves_its_neighbours_bit_equal(model, window):
    _, ids, _, ends = pack()
    before = forward(model, ids, ends)
    changed = list(ids)
    changed[9:17] = [token + 1 for token in ids[9:17]]
    after = forward(model, changed, ends)
    assert before[:7].equal(after[:7]) and before[19:].equal(after[19:])
    assert not before[9:19].equal(after[9:19])


def test_a_packed_sample_has_the_loss_that_it_has_alone(model, window):
    samples, ids, labels, ends = pack()
    packed = forward(model, ids, ends, labels)
    for sample, start, end in zip(samples, ends, ends[1:]):
        alone = forward(model, sample[:-1], labels=sample[1:])
        assert (packed[start:end] - alone).abs().max() < 1e-5, "positions and attention start anew"


def losses_and_gradients(model, batch):
    """Of a micro batch (b, s), by NeMo's own functions: losses (b, s) times the mask, each parameter's gradient."""
    model.zero_grad()
    losses = model.forward_step(model.data_step(iter([(batch, None, None)]))) * batch["loss_mask"]
    losses.sum().backward()
    return losses.detach(), {name: weight.grad.clone() for name, weight in model.named_parameters()}


@pytest.fixture
def answers(monkeypatch):
    """The module, with what it replaces put back at the end."""
    from nemo_tutorial import answers

    for owner, name in (
        (answers.llm.GPTModel, "data_step"),
        (answers.llm.GPTModel, "forward_step"),
        (answers.GPTModel, "_postprocess"),
    ):
        monkeypatch.setattr(owner, name, getattr(owner, name))
    return answers


@pytest.mark.parametrize("share, rows", [(0.3, 128), (0.5, 256), (0.0, 128), (0.95, 320)], ids=str)
def test_logits_of_answers_alone(model, answers, share, rows):
    """Of 320 tokens of two samples: as many rows of logits as are needed, and the same losses and gradients."""
    import torch

    torch.manual_seed(1)
    b, s = 2, 160
    tokens = torch.randint(0, 2000, (b, s + 1))
    batch = {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": torch.arange(s).expand(b, s)}
    batch |= {"loss_mask": (torch.rand(b, s) < share).float(), "attention_mask": torch.ones(1, 1, s, s).tril() < 0.5}
    losses, gradients = losses_and_gradients(model, batch)
    answers.LogitsOfAnswers().setup(None, None, "fit")
    shapes = []
    hook = model.module.output_layer.register_forward_pre_hook(lambda _, inputs: shapes.append(inputs[0].shape[:2]))
    found, found_gradients = losses_and_gradients(model, batch)
    hook.remove()
    assert shapes == [(rows, 1) if rows < b * s else (s, b)]
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    assert (found == 0).sum() == (batch["loss_mask"] == 0).sum()
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-5, msg=name)
    # Without a batch of ours, as a user's own call, all logits and losses are made.
    assert model(batch["tokens"], batch["position_ids"], batch["attention_mask"], batch["labels"]).ne(0).all()


def tune(stages, name, *flags, ranks=1):
    """The metrics of a run, by step, and what it printed."""
    folder = stages / "sixteen"
    if not folder.is_dir():
        folder.mkdir()
        for part in ("training", "validation"):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS]
            (folder / f"{part}.jsonl").write_text("".join(lines), encoding="utf-8")
    flags = ["--experiment", name, *FLAGS.split(), *flags]
    said = on_ranks(stages, "finetuning/finetune.py", ranks, *flags).stdout
    lines = (stages / "results" / name / "record" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], said


def near(found, expected):
    assert [line["step"] for line in found] == [line["step"] for line in expected]
    for line, other in zip(found, expected):
        for value in ("loss", "val_loss", "grad_norm"):
            if value in other:
                assert line[value] == pytest.approx(other[value], rel=1e-5, abs=1e-5), (value, line, other)


def test_packed_and_unpacked_runs_are_the_same(stages):
    """All rows in each step, in packs on two processes and four to a micro batch on one: losses and gradients."""
    flags = ["--global_batch_size", 16, "--max_steps", 3, "--val_check_interval", 3, "--lr", "1e-3"]
    unpacked, said = tune(stages, "unpacked", *flags, "--micro_batch_size", 4)
    assert "packing is off" in said and "none: one row a sample" in said
    packed, said = tune(stages, "packed", *flags, ranks=2)
    assert "with 16 rows of" in said and "packs of" in said
    near(packed, unpacked)
    for line, other in zip(packed, unpacked):  # real tokens: neither the packs' padding nor the rows'
        assert line.get("tokens") == other.get("tokens")
    assert sum("val_loss" in line for line in packed) >= 2 and sum("loss" in line for line in packed) == 3
    # Packs of several times --seq_length, as on a GPU; one to a step, which passes through two stages.
    longer, said = tune(stages, "longer", *flags, "-P", 2, "--packed_sequence_size", 2048, ranks=2)
    assert "1 packs of 2048, with 16 rows of" in said
    near(longer, unpacked)


@pytest.mark.parametrize("flags", [["--no_packing", "--micro_batch_size", 4], LORA], ids=["", "lora"])
def test_logits_of_answers_are_the_same_run(stages, flags):
    """As with NeMo's own settings: losses, validation, gradient norms."""
    flags = [*flags, "--global_batch_size", 8, "--max_steps", 3, "--val_check_interval", 3, "--lr", "1e-3"]
    name = "answers_lora" if "lora" in flags else "answers"
    stock, _ = tune(stages, f"{name}_off", *flags, "--performance", "off")
    near(tune(stages, name, *flags)[0], stock)


def test_adapters_that_are_split_train_as_nemos(stages):
    """Over two processes by TP and sequence: losses, validation and gradient norms, but for their last digits."""
    flags = [*LORA, "-T", 2, "--lora_rank", 4, "--lr", "1e-2"]
    flags += ["--global_batch_size", 8, "--max_steps", 4, "--val_check_interval", 4]
    stock, _ = tune(stages, "split_off", *flags, "--performance", "off", ranks=2)
    split, _ = tune(stages, "split", *flags, ranks=2)
    near(split, stock)
    norms = [[line["grad_norm"] for line in lines if "grad_norm" in line] for lines in (split, stock)]
    assert len(norms[0]) == 4 and norms[0] != norms[1]  # it was another way


@pytest.mark.full
@pytest.mark.parametrize("peft, layout", [([], []), (LORA, []), (LORA, ["-T", 2])], ids=["all", "lora", "lora-tp2"])
def test_a_packed_run_goes_on_where_it_stopped(stages, peft, layout):
    """With the same packs in the same order, on two processes as on one: of 8 rows a step, which are 6 packs."""
    name = f"{'lora' if peft else 'all'}{len(layout)}"
    gpu = preflight.gpus_here() > 0  # whose attention of packs is of 16 bits
    flags = [*"-g 8 --max_steps 6 --lr 1e-3 --precision".split(), "bf16" if gpu else "fp32", *peft]
    unbroken, _ = tune(stages, f"unbroken_{name}", *flags, "--val_check_interval", 3)
    tune(stages, f"broken_{name}", *flags, "--exit_interval", 3)
    resumed, said = tune(stages, f"broken_{name}", *flags, "--exit_interval", 3, *layout, ranks=2)
    assert "goes on from step 3" in said
    steps = {line["step"]: line["loss"] for line in resumed if "loss" in line}
    expected = {line["step"]: line["loss"] for line in unbroken if "loss" in line}
    assert len({round(loss, 4) for loss in expected.values()}) == 6
    print(name, "largest difference of a loss:", max(abs(steps[step] - loss) for step, loss in expected.items()))
    assert steps == pytest.approx(expected, abs=0.02 if gpu else 1e-3 if peft else 1e-5)
