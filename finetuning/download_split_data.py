"""Split instruction data, of the Hugging Face Hub or local, into training.jsonl, validation.jsonl and test.jsonl.

From the repository root, with no arguments, the Traditional Chinese Alpaca data of the tutorial:

    python finetuning/download_split_data.py

writes data/alpaca/. --dataset takes any Hub id, file (parquet, jsonl, json, csv) or folder whose rows are in one of
these forms, which is recognised: Alpaca (instruction, input, output), ShareGPT (conversations of from and value),
messages (of role and content), prompt and completion, or input and output. A row of the output is
{"input": ..., "output": ...}, with "system" if there is one; of several turns, {"messages": [...]}.
"""

import json
import random
import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, corpora, preflight, terminal

NAMES = ("training", "validation", "test")
CHATS = ("messages", "conversations", "conversation")
PAIRS = {  # the columns of a question and its answer -> what the form is called
    ("instruction", "output"): "Alpaca (instruction, input, output)",
    ("prompt", "completion"): "prompt and completion",
    ("input", "output"): "input and output",
}
ROLES = {
    "system": ("system",),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bot"),
}
ROLES = {name: role for role, names in ROLES.items() for name in names}


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument(
        "--dataset",
        default="erhwenkuo/alpaca-data-gpt4-chinese-zhtw",
        help="Hub id, file or folder [erhwenkuo/alpaca-data-gpt4-chinese-zhtw]",
    )
    parser.add_argument("--subset", help="of a Hub dataset that has several")
    parser.add_argument("--split", default="train", help="the dataset's own split to take the rows from [train]")
    parser.add_argument("--revision", help="branch, tag or commit of the Hub dataset [main]")
    parser.add_argument("--ratios", default="98,1,1", help="shares of training, validation, test [98,1,1]")
    parser.add_argument("--seed", type=int, default=1234, help="of the shuffle [1234]")
    parser.add_argument("--output_path", default="data/alpaca", help="[data/alpaca]")
    parser.add_argument("--overwrite", action="store_true", help="replace an existing folder")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def ratios(text):
    """'98,1,1' -> [98.0, 1.0, 1.0]. Raises ValueError in a sentence."""
    try:
        shares = [float(share) for share in text.split(",")]
    except ValueError:
        shares = []
    if len(shares) != 3 or not all(0 <= share < float("inf") for share in shares) or not shares[0] * shares[1]:
        raise ValueError(f"--ratios {text!r} is not three shares, training and validation above 0, such as 98,1,1")
    return shares


def form_of(row):
    """The form of a row, by name: what to call it, the columns it is read from; None if it is none that we know."""
    if isinstance(row, dict):
        for column in CHATS:
            if isinstance(row.get(column), list):
                keys = row[column][0].keys() if row[column] and isinstance(row[column][0], dict) else ()
                name = "ShareGPT (from, value)" if "from" in keys else "messages (role, content)"
                return f"{column}: {name}", (column,)
        for columns, name in PAIRS.items():
            if all(column in row for column in columns):
                return name, columns
    return None


def in_form(row, columns):
    """Whether a row has what the first one was recognised by."""
    kind = list if len(columns) == 1 else (str, list)
    return isinstance(row, dict) and all(isinstance(row.get(column), kind) for column in columns)


def turns_of(row, columns):
    """A row as turns, [(role, text), ...]. Raises ValueError: why it can't be used."""
    turns = [("system", row["system"])] if row.get("system") else []
    if len(columns) == 1:  # a chat
        return turns + _chat(row[columns[0]])
    question, answer = (row[column] for column in columns)
    if isinstance(question, list) and isinstance(answer, list):  # prompt and completion, each a chat
        return turns + _chat(question) + _chat(answer)
    for pair in row.get("history") or []:  # of Alpaca rows: earlier questions, each with its answer
        turns += [("user", pair[0]), ("assistant", pair[1])]
    if columns[0] == "instruction":
        question = f"{question.strip()}\n{(row.get('input') or '').strip()}"
    return [*turns, ("user", question.strip()), ("assistant", answer.strip())]


def _chat(turns):
    found = []
    for turn in turns:
        role, text = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if role not in ROLES or turn.get("tool_calls"):
            raise ValueError(f"a turn of {role!r}: only system, user and assistant are trained on")
        found.append((ROLES[role], text))
    return found


def to_row(turns):
    """Turns as a row of the output. Raises ValueError: why the row can't be used."""
    while turns and turns[-1][0] != "assistant":
        turns = turns[:-1]  # a last question without an answer teaches nothing
    if not turns:
        raise ValueError("no answer")
    if not all(isinstance(text, str) and text.strip() for _, text in turns):
        raise ValueError("an empty turn, or one that is not text")
    roles = [role for role, _ in turns]
    if roles[roles[0] == "system" :] != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError("turns of user and assistant do not alternate")
    if len(roles) > 3:
        return {"messages": [{"role": role, "content": text} for role, text in turns]}
    names = {"system": "system", "user": "input", "assistant": "output"}
    return {names[role]: text for role, text in turns}


def prompt_of(row):
    """What is asked, spaces aside: rows with the same one must not be in two splits."""
    texts = [turn["content"] for turn in row["messages"][:-1]] if "messages" in row else [row["input"]]
    return json.dumps([" ".join(text.split()) for text in [row.get("system", ""), *texts]])


def read(args, left_out):
    """The form, and the rows to write: usable, each question once. Counts the others in `left_out`. May exit 1."""
    rows, seen, form = [], set(), None
    for place, row in corpora.rows(args.dataset, args.split, args.subset, args.revision):
        form = form or form_of(row)
        if form is None:
            has = ", ".join(row) if isinstance(row, dict) else type(row).__name__
            raise ValueError(f"{place} has {has}: in none of the forms Alpaca, ShareGPT, messages, prompt/completion")
        if not in_form(row, form[1]):
            wrong = "is not JSON: the line is empty" if row is None else f"is not in the form {form[0]}"
            raise ValueError(f"{place} {wrong}")
        try:
            row = to_row(turns_of(row, form[1]))
            json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            left_out.setdefault("half a character (a lone surrogate)", []).append(place)
            continue
        except (ValueError, AttributeError, TypeError, IndexError) as error:
            reason = str(error) if type(error) is ValueError else "a turn that is none"
            left_out.setdefault(reason, []).append(place)
            continue
        prompt = prompt_of(row)
        if prompt in seen:
            left_out.setdefault("repeated questions", []).append(place)
            continue
        seen.add(prompt)
        rows.append(row)
    return form, rows


def split(rows, shares, seed):
    """Shuffle and split: every share above 0 gets at least one row, and no question is in two of them."""
    random.Random(seed).shuffle(rows)
    sizes = [max(1, round(len(rows) * share / sum(shares))) if share else 0 for share in shares[1:]]
    first = len(rows) - sum(sizes)
    return rows[:first], rows[first : first + sizes[0]], rows[first + sizes[0] :]


def main(argv=None):
    args = parse_args(argv)
    problems, shares = [], None
    try:
        shares = ratios(args.ratios)
    except ValueError as error:
        problems.append(str(error))
    problems += corpora.problems("--dataset", [args.dataset], args.subset, args.revision)
    preflight.report(problems + preflight.output_problems(args, [args.dataset] if Path(args.dataset).exists() else []))
    terminal.describe(
        "split", [("dataset", args.dataset), ("ratios", args.ratios), ("seed", args.seed), ("output", args.output_path)]
    )
    if args.dry_run:
        return
    left_out = {}
    try:
        form, rows = read(args, left_out)
        if len(rows) < 3:
            why = "".join(f"; {len(places)} {reason}" for reason, places in left_out.items())
            raise ValueError(f"{args.dataset} holds {len(rows)} different rows; three are the least{why}")
        with checkpoints.published(args.output_path, args.overwrite) as partial:
            partial.mkdir()
            parts = split(rows, shares, args.seed)
            for name, part in zip(NAMES, parts):
                with open(partial / f"{name}.jsonl", "w", encoding="utf-8") as file:
                    file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in part)
    except ValueError as error:
        flag = "" if str(error).startswith("--") else "--dataset: "
        terminal.fail([f"{flag}{error}; nothing was written"], code=1)
    except OSError as error:
        terminal.fail([f"--output_path {args.output_path}: {error}; nothing was written"], code=1)
    several = sum("messages" in row for row in rows)
    terminal.describe(
        "written",
        [
            ("folder", args.output_path),
            ("form", form[0] + (f"; {several:,} rows of several turns" if several else "")),
            *((name, f"{len(part):,} rows") for name, part in zip(NAMES, parts)),
            *(
                ("left out", f"{len(places):,} {reason} (first: {places[0]})")
                for reason, places in sorted(left_out.items())
            ),
        ],
    )


if __name__ == "__main__":
    main()
