"""How a row of instruction data becomes text for the model, in the terms of NeMo's SFT dataset."""

import hashlib
import json
import re
import tempfile
from pathlib import Path

from nemo_tutorial import terminal

KEYS = ("input", "output")
# For a tokenizer without a chat template.
PLAIN = "### Instruction:\n{input}\n\n### Response:\n{output}"


def template_problems(template):
    """What NeMo's dataset would refuse in --prompt_template, after half a minute and without saying why."""
    if template is None:
        return []
    problems = []
    if not template.endswith("{output}"):
        problems.append("--prompt_template must end with {output}: NeMo adds only the end token after it")
    other = sorted(set(re.findall(r"{(.*?)}", template)) - set(KEYS))
    if other or template.count("{input}") != 1 or template.count("{output}") != 1:
        problems.append(
            "--prompt_template needs {input} and {output} once each and no other braces"
            + (f", not {{{other[0]}}}" if other else "")
        )
    return problems


def template(asked, tokenizer_config):
    """The prompt template as text: the one asked for, or the tokenizer's chat template with the two placeholders.

    Raises ValueError if the chat template can't be said in NeMo's terms.
    """
    if asked is not None:
        return asked.replace("\\n", "\n").replace("\\t", "\t")
    tokenizer = _hf_tokenizer(tokenizer_config)
    if not tokenizer.chat_template:
        terminal.warn(f"the tokenizer has no chat template; rows are written as {PLAIN!r}")
        return PLAIN
    user, answer = {"role": "user", "content": "{input}"}, {"role": "assistant", "content": "{output}"}
    prompt = tokenizer.apply_chat_template([user], tokenize=False, add_generation_prompt=True)
    whole = tokenizer.apply_chat_template([user, answer], tokenize=False)
    end = whole[len(prompt) + len("{output}") :]
    if whole != prompt + "{output}" + end or prompt.count("{") != 1 or "{input}" not in prompt:
        raise ValueError("the tokenizer's chat template can't be written as a --prompt_template; give one")
    if not end.startswith(tokenizer.eos_token):
        raise ValueError(
            f"the chat template ends an answer with {end!r}, but NeMo can add only the end token "
            f"{tokenizer.eos_token!r}; give a --prompt_template"
        )
    return prompt + "{output}"


def dataset_kwargs(template):
    """Arguments for NeMo's SFT dataset."""
    # NeMo decodes the template with "unicode_escape", which garbles Chinese unless it is escaped before.
    escaped = template.encode("unicode_escape").decode("ascii")
    return {"prompt_template": escaped, "add_bos": False, "add_eos": True}


def _hf_tokenizer(config):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(config.pretrained_model_name)


def show_sample(args, template, tokenizer_config):
    """Let NeMo tokenize the first rows, check that the end token is learnt, and print one with its loss mask.

    Raises ValueError if NeMo's tokens are not those of the tokenizer's own chat template.
    """
    import fiddle as fdl
    from nemo.collections.llm.gpt.data.core import create_sft_dataset

    with open(Path(args.dataset_path) / "training.jsonl", encoding="utf-8") as file:
        rows = [json.loads(line) for line, _ in zip(file, range(20))]
    tokenizer = fdl.build(tokenizer_config)
    hf_tokenizer = _hf_tokenizer(tokenizer_config)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "rows.jsonl"
        file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        dataset = create_sft_dataset(file, tokenizer, seq_length=args.seq_length, **dataset_kwargs(template))
        samples = [dataset[i] for i in range(len(rows))]
    for number, (row, sample) in enumerate(zip(rows, samples), 1):
        if sample["input_ids"][-1] != tokenizer.eos_id or sample["loss_mask"][-1] != 1:
            raise ValueError(f"row {number}: the end token is not in the loss")
        if args.prompt_template is None and hf_tokenizer.chat_template and len(sample["input_ids"]) < args.seq_length:
            messages = [
                {"role": "user", "content": row["input"].strip(" ")},
                {"role": "assistant", "content": row["output"].strip(" ")},
            ]
            ids = hf_tokenizer.apply_chat_template(messages)
            if sample["input_ids"] != ids[: len(sample["input_ids"])]:
                raise ValueError(
                    f"row {number}: NeMo's tokens differ from the chat template's; give a --prompt_template"
                )
    sample = samples[0]
    start = sample["answer_start_idx"]
    terminal.describe(
        "first row",
        [
            ("prompt, no loss", repr(hf_tokenizer.decode(sample["input_ids"][:start]))),
            ("answer, loss", repr(hf_tokenizer.decode(sample["input_ids"][start:]))),
        ],
    )


def remove_stale_indexes(folder):
    """Remove NeMo's line index beside a .jsonl that has changed since: NeMo never does, and would read wrong rows."""
    for file in Path(folder).glob("*.jsonl"):
        for index in file.parent.glob(file.name + ".idx*"):
            if index.stat().st_mtime <= file.stat().st_mtime:
                index.unlink()


def fingerprint(args, template):
    """A name for packed data: it changes with the rows, the template, the tokenizer and the lengths."""
    digest = hashlib.sha256(f"{template}\0{args.seq_length}\0{args.packed_sequence_size}\0{args.seed}".encode())
    for name in ("training.jsonl", "validation.jsonl"):
        digest.update((Path(args.dataset_path) / name).read_bytes())
    return "packed-" + digest.hexdigest()[:16]
