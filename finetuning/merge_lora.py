"""Merge a LoRA or DoRA checkpoint into the model that it was trained on: a full NeMo 2 checkpoint, ready for export.

From the repository root:

    python finetuning/merge_lora.py \\
        --source "results/llama31_finetuning/checkpoints/NAME-last" --output_path nemo_ckpt/merged

The base model is looked for where it was when the adapter was trained; if it has moved, name it with --base.
No GPU is needed, and memory for the largest tensor only.
"""

import sys
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, models, preflight, terminal, trust


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--source", required=True, help="LoRA checkpoint: a folder with weights/ and context/")
    parser.add_argument("--base", help="the model it was trained on, if that has moved [where it was then]")
    arguments.add_output(parser, "the merged NeMo checkpoint")
    arguments.add_trust(parser)
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def base_model(args):
    """The checkpoint that the adapter was trained on: (path, problems)."""
    try:
        trained_on = checkpoints.adapter_base(args.source)
    except ValueError as error:
        return None, [f"--source: {error}"]
    base = args.base or trained_on
    problem = checkpoints.problem(base)
    if problem and not args.base:
        return base, [f"--source: its base model: {problem}; name where it is now with --base"]
    if problem or checkpoints.is_adapter(base):
        return base, [f"--base: {problem or base + ' is an adapter itself'}"]
    try:
        shape, expected = models.from_nemo(base), models.from_nemo(args.source)
    except ValueError as error:
        return base, [f"--base: {error}"]
    differ = [
        f"{field} {getattr(shape, field)}, not {getattr(expected, field)}"
        for field in ("num_hidden_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "vocab_size")
        if getattr(shape, field) != getattr(expected, field)
    ]
    return base, [f"--base {base} is another model than the adapter's: {', '.join(differ)}"] if differ else []


def main(argv=None):
    args = parse_args(argv)
    problems = preflight.checkpoint_problems("--source", args.source)
    if not problems and not checkpoints.is_adapter(args.source):
        problems.append(f"--source {args.source} is no LoRA checkpoint but a full one; export it as it is")
    base = None
    if not problems:
        base, problems = base_model(args)
    if not problems:
        problems += trust.refusals("--source", args.source, args.trust_checkpoint)
        problems += trust.refusals("--base" if args.base else "--source: its base model", base, args.trust_checkpoint)
    problems += preflight.output_problems(args, [args.source, *([base] if base else [])])
    preflight.report(problems)
    size = checkpoints.size(Path(base) / "weights")
    terminal.describe(
        "merge",
        [
            ("adapter", args.source),
            ("base model", f"{base}, {terminal.number(models.from_nemo(base).parameters)} parameters"),
            ("output", f"{args.output_path}, at most {terminal.gigabytes(size)}"),
            ("advisories", trust.advisories()),
        ],
    )
    if args.dry_run:
        return

    from nemo_tutorial import adapters

    began = time.monotonic()
    rows = [("checkpoint", args.output_path)]
    try:
        with checkpoints.published(args.output_path, args.overwrite) as partial:
            with checkpoints.unchanged(base, args.source):
                rows += adapters.merge(Path(args.source), Path(base), partial)
            checkpoints.write_manifest(partial, adapter=str(Path(args.source).absolute()))
    except (ValueError, OSError) as error:
        terminal.fail([f"{error}; nothing was written"], code=1)
    terminal.describe("merged", [*rows, ("seconds", f"{time.monotonic() - began:.0f}")])


if __name__ == "__main__":
    main()
