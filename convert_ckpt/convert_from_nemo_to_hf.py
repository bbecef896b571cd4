"""Export a NeMo 2 checkpoint to a Hugging Face folder that transformers, vLLM and others load.

From the repository root:

    python convert_ckpt/convert_from_nemo_to_hf.py \\
        --source "results/llama31_finetuning/checkpoints/NAME-last" --output_path hf_ckpt

The tokenizer's files and config.json are those of the model that was imported. A LoRA checkpoint is merged
first, by finetuning/merge_lora.py. No GPU is needed, and memory for the largest tensor only.
--push_to_hub OWNER/NAME uploads the folder, once verified, with a README.md that says how the model was made.
"""

import sys
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, hub, models, preflight, runs, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--source", required=True, help="NeMo 2 checkpoint, or a run: its newest complete checkpoint")
    arguments.add_output(parser, "the Hugging Face folder")
    parser.add_argument("--max_shard_size", default="5GB", help="largest safetensors file [5GB]")
    arguments.add_verify(parser)
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder to this model of the Hub")
    parser.add_argument("--private", action="store_true", help="create the model of --push_to_hub as a private one")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def push(args):
    """Upload the exported folder; it stays if that fails."""
    try:
        page = hub.upload(args.output_path, args.push_to_hub, args.private)
    except ValueError as error:
        again = hub.upload_command(args.output_path, args.push_to_hub, args.private)
        terminal.fail([f"--push_to_hub: {error}. {args.output_path} is whole; once that is mended: {again}"], code=1)
    terminal.describe("uploaded", [("commit", page)])


def main(argv=None):
    args = parse_args(argv)
    source = Path(args.source)
    if (source / "checkpoints").is_dir():
        source = checkpoints.latest(source) or source / "checkpoints"
    problems = preflight.checkpoint_problems("--source", source)
    if checkpoints.is_adapter(source):
        problems.append(
            f"--source {source} is a LoRA adapter; merge it first: "
            f"python finetuning/merge_lora.py --source '{source}' --output_path nemo_ckpt/merged"
        )
    problems += preflight.output_problems(args, [source]) + hub.upload_problems(args.push_to_hub, args.private)
    model = None
    if not problems:
        try:
            model = models.from_nemo(source)
            problems += preflight.disk_problems(
                args.output_path, 2 * model.parameters, f"--output_path {args.output_path}"
            )
        except ValueError as error:
            problems.append(f"--source: {error}")
    preflight.report(problems)
    own_config = (models.tokenizer_folder(source) / "config.json").is_file()
    terminal.describe(
        "export",
        [
            ("source", source),
            ("shape", f"{model.family.architecture}, {terminal.number(model.parameters)} parameters"),
            (
                "config",
                "that of the imported model" if own_config else "NeMo's own: the checkpoint was not imported by us",
            ),
            ("output", args.output_path),
            ("upload", args.push_to_hub and args.push_to_hub + (" (private)" if args.private else "")),
        ],
    )
    if args.dry_run == "plan":
        return

    from nemo_tutorial import conversion

    if args.dry_run == "full":
        print(conversion.exporter(source).config)
        return
    began = time.monotonic()
    rows = [("folder", args.output_path)]
    try:
        with checkpoints.published(args.output_path, args.overwrite) as partial:
            conversion.export(source, partial, args.max_shard_size)
            rows += conversion.verify(source, partial, partial, args.verify)
            if args.push_to_hub:
                card = hub.model_card(args.push_to_hub, *runs.stages(source))
                (partial / "README.md").write_text(card, encoding="utf-8")
    except (ValueError, OSError) as error:
        terminal.fail([f"{error}; nothing was written"], code=1)
    terminal.describe("exported", [*rows, ("seconds", f"{time.monotonic() - began:.0f}")])
    if args.push_to_hub:
        push(args)


if __name__ == "__main__":
    main()
