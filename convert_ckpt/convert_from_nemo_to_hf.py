"""Export a NeMo 2 checkpoint to a Hugging Face folder that transformers, vLLM and others load.

From the repository root:

    python convert_ckpt/convert_from_nemo_to_hf.py \\
        --source "results/llama31_finetuning/checkpoints/NAME-last" --output_path hf_ckpt

The tokenizer's files and config.json are those of the model that was imported. A LoRA checkpoint is merged
first, by finetuning/merge_lora.py. No GPU is needed; the memory needed is about twice the model's size.
"""

import sys
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, models, preflight, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--source", required=True, help="NeMo 2 checkpoint: a folder with weights/ and context/")
    arguments.add_output(parser, "the Hugging Face folder")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    problems = preflight.checkpoint_problems("--source", args.source)
    if checkpoints.is_adapter(args.source):
        problems.append(
            f"--source {args.source} is a LoRA adapter; merge it first: "
            f"python finetuning/merge_lora.py --source '{args.source}' --output_path nemo_ckpt/merged"
        )
    problems += preflight.output_problems(args, [args.source])
    model = None
    if not problems:
        try:
            model = models.from_nemo(args.source)
            problems += preflight.disk_problems(
                args.output_path, 2 * model.parameters, f"--output_path {args.output_path}"
            )
        except ValueError as error:
            problems.append(f"--source: {error}")
    preflight.report(problems)
    own_config = (models.tokenizer_folder(args.source) / "config.json").is_file()
    terminal.describe(
        "export",
        [
            ("source", args.source),
            ("shape", f"{model.family.architecture}, {terminal.number(model.parameters)} parameters"),
            (
                "config",
                "that of the imported model" if own_config else "NeMo's own: the checkpoint was not imported by us",
            ),
            ("output", args.output_path),
        ],
    )
    if args.dry_run == "plan":
        return

    from nemo_tutorial import conversion

    if args.dry_run == "full":
        print(conversion.exporter(Path(args.source)).config)
        return
    began = time.monotonic()
    with checkpoints.published(args.output_path, args.overwrite) as partial:
        tensors, bad = conversion.export(Path(args.source), partial)
        if bad:
            terminal.fail([f"{name}: {why}; nothing was written" for name, why in bad], code=1)
    terminal.describe(
        "exported",
        [
            ("folder", args.output_path),
            ("tensors", f"{tensors} written, and read back by transformers without one missing or unexpected"),
            ("seconds", f"{time.monotonic() - began:.0f}"),
        ],
    )


if __name__ == "__main__":
    main()
