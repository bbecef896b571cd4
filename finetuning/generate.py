"""Ask a Hugging Face model questions through its chat template, with plain transformers, greedily.

From the repository root:

    python finetuning/generate.py --model hf_ckpt --prompt "台灣最高的山是哪一座？"
    python finetuning/generate.py --model hf_ckpt --questions data/alpaca/test.jsonl --limit 20

It shows that an exported model needs nothing of NeMo any more.
"""

import json
import sys
from itertools import islice
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, models, preflight, prompts, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    group = parser.add_mutually_exclusive_group(required=True)
    group.add_argument("--prompt", help="one question")
    group.add_argument("--questions", help="JSON lines, as for training; the last answer is asked for")
    parser.add_argument("--system_prompt", type=prompts.unescaped, help="that of the training [none]")
    parser.add_argument("--limit", type=arguments.positive, help="ask only the first ones [all]")
    parser.add_argument("--max_new_tokens", type=arguments.positive, default=64, help="[64]")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the tokenizer's own code [refused]")
    parser.add_argument("--output_path", help="write questions and replies here as JSON as well")
    return parser.parse_args(argv)


def answered(row):
    """A question that need not have an answer, as a row that has one."""
    return {"output": "", **row} if isinstance(row, dict) else row


def main(argv=None):
    args = parse_args(argv)
    problems = []
    try:
        models.from_hf(args.model, args.trust_remote_code)
        models.weight_files(args.model)
    except ValueError as error:
        problems.append(f"--model: {error}")
    if args.questions:
        if Path(args.questions).is_file():
            problem = preflight.count_rows(args.questions, lambda row: prompts.row_problem(answered(row)))[1]
            problems += [problem] if problem else []
        else:
            problems.append(f"--questions {args.questions} is not a file")
    preflight.report(problems)
    rows = [{"input": args.prompt}]
    if args.questions:
        with open(args.questions, encoding="utf-8") as lines:
            rows = [json.loads(line) for line in islice(lines, args.limit)]

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=args.trust_remote_code)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").to(device)
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    for row in rows:
        messages = prompts.messages(answered(row), args.system_prompt)
        expected = messages.pop()["content"]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(device)
        output = model.generate(
            inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=args.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        new = output[0, inputs["input_ids"].shape[1] :].tolist()
        row["reply"] = tokenizer.decode(new, skip_special_tokens=True)
        row["ended"] = new[-1] in ends
        terminal.describe(messages[-1]["content"], [("reply", row["reply"]), ("expected", expected or None)])
    if args.output_path:
        Path(args.output_path).write_text(json.dumps(rows, ensure_ascii=False, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
