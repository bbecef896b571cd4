"""Import a Hugging Face model as a NeMo 2 checkpoint, and check every tensor of it against the source.

From the repository root:

    python convert_ckpt/convert_from_hf_to_nemo.py \\
        --source Llama-3.1-8B-Instruct --output_path nemo_ckpt/Llama-3.1-8B-Instruct

--source is a folder with config.json, a tokenizer and *.safetensors, or a Hub id (OWNER/MODEL): it is downloaded
to the Hub's cache, and without a network the copy there is used.
No GPU is needed, and memory for the largest tensor only: the weights pass through as a stream.
"""

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, compat, hub, models, preflight, terminal


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    parser.add_argument("--source", required=True, help="Hugging Face folder or Hub id")
    parser.add_argument("--revision", default="main", help="branch, tag or commit of a Hub id [main]")
    arguments.add_output(parser, "the NeMo checkpoint")
    arguments.add_verify(parser)
    parser.add_argument(
        "--trust_remote_code",
        action="store_true",
        help="accept a model that brings code of its own: its tokenizer's is run, its model's is not [refused]",
    )
    arguments.add_dry_run(parser)
    return parser.parse_args(argv)


def source_folder(args, problems):
    """The local folder of --source; a Hub id is downloaded first, unless this is a dry run."""
    if not models.is_hub_id(args.source):
        if args.revision != "main":
            problems.append(f"--revision {args.revision}: --source {args.source} is no Hub id; leave the flag out")
        return Path(args.source)
    if args.dry_run is not None:
        return models.hub_snapshot(args.source, args.revision) or Path(args.source)
    preflight.report(problems)  # before the download
    try:
        # First what is small: a model that can't be converted, or has no place here, costs no download.
        papers = hub.download_papers(args.source, args.revision, args.trust_remote_code)
        model = models.from_hf(papers, args.trust_remote_code)
        what = f"--output_path {args.output_path}"
        preflight.report(preflight.disk_problems(args.output_path, 2 * model.parameters, what))
        return hub.download_weights(args.source, papers)
    except ValueError as error:
        preflight.report([f"--source: {error}"])


def main(argv=None):
    args = parse_args(argv)
    problems, model, files = preflight.output_problems(args, [args.source]), None, []
    folder = source_folder(args, problems)
    try:
        model = models.from_hf(folder, args.trust_remote_code)
        files = models.weight_files(folder)
    except ValueError as error:
        problems.append(f"--source: {error}")
    size = sum(file.stat().st_size for file in files)
    problems += preflight.disk_problems(args.output_path, size, f"--output_path {args.output_path}")
    preflight.report(problems)
    terminal.describe(
        "import",
        [
            ("source", folder),
            ("shape", f"{model.family.architecture}, {terminal.number(model.parameters)} parameters"),
            ("size", f"{terminal.gigabytes(size)} in {len(files)} file(s)"),
            ("output", args.output_path),
            ("recipe", model.recipe),
        ],
    )
    if args.dry_run == "plan":
        return

    from nemo_tutorial import conversion

    if args.dry_run == "full":
        print(conversion.importer(folder, model).config)
        return
    began = time.monotonic()
    rows = [("checkpoint", args.output_path)]
    try:
        with checkpoints.published(args.output_path, args.overwrite) as partial:
            conversion.import_model(folder, model, partial)
            if args.verify != "none":
                checkpoints.to_disk(partial, forget=True)
            with ThreadPoolExecutor(1) as pool:  # hashed while it is read to be verified
                files = pool.submit(checkpoints.fingerprints, partial)
                rows += conversion.verify(partial, folder, args.verify)
            facts = {"source": args.source, "folder": str(Path(folder).absolute()), "versions": compat.versions()}
            if models.is_hub_id(args.source):  # the Hub's cache names the folder by the commit
                facts |= {"revision": args.revision, "commit": Path(folder).name}
            checkpoints.write_manifest(partial, files.result(), **facts)
    except (ValueError, OSError) as error:
        terminal.fail([f"{error}; nothing was written"], code=1)
    terminal.describe("imported", [*rows, ("seconds", f"{time.monotonic() - began:.0f}")])


if __name__ == "__main__":
    main()
