"""Export a NeMo 2 checkpoint to a Hugging Face folder that transformers, vLLM and others load.

From the repository root:

    python convert_ckpt/convert_from_nemo_to_hf.py \\
        --source "results/llama31_finetuning/checkpoints/NAME-last" --output_path hf_ckpt

The tokenizer's files and config.json are those of the model that was imported. A LoRA checkpoint is merged
first, by finetuning/merge_lora.py, or written as an adapter for `peft`: --adapter_only.
No GPU is needed, and memory for the largest tensor only.
--push_to_hub OWNER/NAME uploads the folder, once verified, with a README.md that says how the model was made.
"""

import sys
import time
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, hub, models, preflight, runs, terminal, trust


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--source", required=True, help="NeMo 2 checkpoint, or a run: its newest complete checkpoint")
    arguments.add_output(parser, "the Hugging Face folder")
    parser.add_argument("--adapter_only", action="store_true", help="write a LoRA checkpoint as an adapter for peft")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), help="cast the weights [as they are]")
    parser.add_argument(
        "--max_shard_size", type=arguments.file_size, metavar="SIZE", help="largest safetensors file [5GB]"
    )
    arguments.add_verify(parser)
    arguments.add_trust(parser)
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="upload the folder to this model of the Hub")
    parser.add_argument("--private", action="store_true", help="create the model of --push_to_hub as a private one")
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def kind_problems(args, source):
    """Whether --source holds what is to be written: a model, or an adapter."""
    if not args.adapter_only and checkpoints.is_adapter(source):
        return [
            f"--source {source} is a LoRA adapter; merge it first: "
            f"python finetuning/merge_lora.py --source '{source}' --output_path nemo_ckpt/merged, "
            "or write it as an adapter for peft: --adapter_only"
        ]
    if not args.adapter_only:
        return []
    problems = []
    if checkpoints.is_nemo(source) and not checkpoints.is_adapter(source):
        problems.append(f"--adapter_only: {source} is no adapter but a whole model; leave the flag out")
    if args.max_shard_size:
        problems.append(f"--max_shard_size {args.max_shard_size} has no effect with --adapter_only; leave it out")
    if args.verify != "tensors":
        problems.append(
            f"--verify {args.verify} is not for --adapter_only, whose tensors are always compared; leave it out"
        )
    return problems


def push(args):
    """Upload the exported folder; it stays if that fails."""
    try:
        page = hub.upload(args.output_path, args.push_to_hub, args.private)
    except ValueError as error:
        again = hub.upload_command(args.output_path, args.push_to_hub, args.private)
        terminal.fail([f"--push_to_hub: {error}. {args.output_path} is whole; once that is mended: {again}"], code=1)
    terminal.describe("uploaded", [("commit", page)])


def write(args, source, output):
    """Write the model or the adapter, and check it: rows to show. Raises ValueError if it is not as it should be."""
    if args.adapter_only:
        from nemo_tutorial import adapters

        base, revision = checkpoints.hugging_face_base(source)
        rows = adapters.export(source, output, base, revision, args.dtype)
        return [*rows, ("base model", base or "to be exported, and named when the adapter is loaded")]
    from nemo_tutorial import conversion

    conversion.export(source, output, args.max_shard_size or "5GB", args.dtype)
    if args.verify != "none":
        checkpoints.to_disk(output, forget=True)
    rows = conversion.verify(source, output, args.verify, args.dtype)
    return rows + (conversion.sentence(output) if args.verify != "none" else [])


def main(argv=None):
    args = parse_args(argv)
    source = Path(args.source)
    if (source / "checkpoints").is_dir():
        source = checkpoints.latest(source) or source / "checkpoints"
    problems = preflight.checkpoint_problems("--source", source) + kind_problems(args, source)
    problems += preflight.output_problems(args, [source]) + hub.upload_problems(args.push_to_hub, args.private)
    model = None
    if not problems:
        try:
            model = models.from_nemo(source)
            problems += trust.refusals("--source", source, args.trust_checkpoint)
            size = model.parameters * (4 if args.dtype == "float32" else 2)
            size = checkpoints.size(source / "weights") if args.adapter_only else size
            problems += preflight.disk_problems(args.output_path, size, f"--output_path {args.output_path}")
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
            ("dtype", args.dtype),
            ("output", f"{args.output_path}, an adapter for peft" if args.adapter_only else args.output_path),
            ("advisories", trust.advisories()),
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
            with checkpoints.unchanged(source):
                rows += write(args, source, partial)
            if args.push_to_hub:
                card = hub.model_card(args.push_to_hub, *runs.stages(source), args.adapter_only)
                (partial / "README.md").write_text(card, encoding="utf-8")
    except (ValueError, OSError) as error:
        terminal.fail([f"{error}; nothing was written"], code=1)
    terminal.describe("exported", [*rows, ("seconds", f"{time.monotonic() - began:.0f}")])
    if args.push_to_hub:
        push(args)


if __name__ == "__main__":
    main()
