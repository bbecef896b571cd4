"""The prompts of --generate_prompts: read, checked, and turned into tokens before a run starts."""

import json
from pathlib import Path

from nemo_tutorial import preflight, prompts

LIMIT = 32  # prompts: each costs as many forward passes as --generate_tokens, at each validation


def problems(args):
    """Fill in --generate_tokens; what is wrong with --generate_prompts."""
    if not args.generate_prompts:
        if args.generate_tokens:
            return ["--generate_tokens has no effect without --generate_prompts; add it, or leave this out"]
        return []
    args.generate_tokens = args.generate_tokens or 32
    file, found = Path(args.generate_prompts), []
    if not file.is_file():
        found.append(f"--generate_prompts {file} is not a file")
    elif file.suffix == ".jsonl":
        problem = preflight.count_rows(file, lambda row: prompts.row_problem(_answered(row)))[1]
        found += [f"--generate_prompts: {problem}"] if problem else []
    else:
        try:
            file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            found.append(f"--generate_prompts: {file} is not UTF-8 ({error}); write it as such")
    if not found:
        count = len(read(file))
        if not 0 < count <= LIMIT:
            found.append(f"--generate_prompts {file} has {count} prompts; give it 1 to {LIMIT}")
    if args.context_parallel_size > 1:
        found.append(
            f"--generate_prompts does not go with --context_parallel_size {args.context_parallel_size}, "
            "which cuts a text between GPUs; leave one out"
        )
    return found


def read(file):
    """The rows of a file: of .jsonl as for training, the answer not needed; else each line is a text."""
    lines = [line for line in Path(file).read_text(encoding="utf-8").splitlines() if line.strip()]
    return [json.loads(line) if Path(file).suffix == ".jsonl" else {"input": line} for line in lines]


def _answered(row):
    return {"output": "", **row} if isinstance(row, dict) and "messages" not in row else row


def asked(args, stage, tokenizer_folder):
    """The content of a run's record/prompts.json, which its ranks read, as text.

    In pretraining a prompt is the beginning of a text; in tuning it is asked by the chat template, as in training.
    Raises ValueError for a prompt that is too long, or that the template refuses.
    """
    rows = read(args.generate_prompts)
    if stage == "pretraining":
        from transformers import AutoTokenizer

        from nemo_tutorial import models

        code = models.tokenizer_code(tokenizer_folder)
        tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=bool(code))
        found = [{"text": prompts.messages(_answered(row))[-2]["content"]} for row in rows]
        tokens = [tokenizer(prompt["text"])["input_ids"] for prompt in found]
        ends = [tokenizer.eos_token_id]
        if all(ids and ids[-1] == tokenizer.eos_token_id for ids in tokens):  # it would end each prompt
            tokens = [ids[:-1] for ids in tokens]
    else:
        chat = prompts.Chat(tokenizer_folder, args.prompt_template)
        talks = [prompts.messages(_answered(row), args.system_prompt) for row in rows]
        texts = [chat.text(talk[:-1], ask=True) for talk in talks]
        tokens = [chat.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        ends = [chat.end, chat.tokenizer.eos_token_id]
        found = [{"text": talk[-2]["content"], "expected": talk[-1]["content"]} for talk in talks]
    for prompt, ids in zip(found, tokens):
        if not 0 < len(ids) <= args.seq_length - args.generate_tokens:
            raise ValueError(
                f"--generate_prompts: {prompt['text'][:60]!r} has {len(ids)} tokens, which with --generate_tokens "
                f"{args.generate_tokens} is not within --seq_length {args.seq_length}; shorten one"
            )
        prompt["tokens"] = ids
    content = {"ends": sorted({end for end in ends if end is not None}), "prompts": found}
    return json.dumps(content, ensure_ascii=False)
