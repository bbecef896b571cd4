"""What a preprocessed dataset holds: its record (PREFIX.json) and a histogram of its lengths (PREFIX.png).

Memory does not grow with the dataset: lengths and hashes are read from files, a slice at a time.
"""

import json

from nemo_tutorial import documents, terminal

SLICE = 4_000_000  # numbers read at a time
SHARES = (0, 5, 25, 50, 75, 95, 99, 100)


def record(args, writer, reference, library, key):
    """What there is to know of one field's dataset; training compares its tokenizer with the model's."""
    lengths, counts = lengths_of(writer.path(key, "lengths"))
    count, tokens = int(counts.sum()), int((lengths * counts).sum())
    inputs = {}
    for piece in writer.pieces:
        one = inputs.setdefault(piece["input"], {"path": piece["input"], "bytes": documents.size(piece["input"])})
        one["lines"] = one.get("lines", 0) + piece["lines"]
        one["xxh3_128_of_text"] = piece["digest"]  # the last one's is that of the whole
    return {
        "documents": count,
        "tokens": tokens,
        "token_bytes": writer.token_bytes,
        "lengths": {
            "mean": round(tokens / max(1, count), 1),
            "percentiles": {share: percentile(lengths, counts, share) for share in SHARES},
        },
        "duplicates": duplicates(writer.path(key, "hashes")),
        "empty_documents": sum(piece["keys"][key]["empty"] for piece in writer.pieces),
        "empty_lines": sum(piece["blank"] for piece in writer.pieces),
        "skipped_lines": sum(piece["skipped"] for piece in writer.pieces),
        "tokenizer": {
            "name": args.tokenizer_type,
            "fingerprint": reference.fingerprint,
            "entries": reference.size,
            "eod": reference.eod,
            "library": library,
            "versions": reference.versions,
        },
        "options": {"json_key": key, "append_eod": args.append_eod, "add_bos": args.add_bos, "on_error": args.on_error},
        "inputs": list(inputs.values()),
    }


def save(found, lengths, stem):
    """Write STEM.json and, with matplotlib, STEM.png; `lengths` is the file of the documents' lengths."""
    with open(stem + ".json", "w", encoding="utf-8") as file:
        json.dump(found, file, indent=2, ensure_ascii=False)
    matplotlib = import_matplotlib()
    if not matplotlib:
        terminal.warn("no histogram of the lengths: matplotlib is not installed (pip install matplotlib)")
        return
    Figure, FigureCanvasAgg = matplotlib
    import numpy

    lengths, counts = lengths_of(lengths)
    edges = numpy.unique(numpy.geomspace(1, lengths[-1] + 1, 60).astype(int))
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.stairs(numpy.histogram(lengths, edges, weights=counts)[0], edges, fill=True)
    axes.set(xscale="log", xlabel="tokens in a document", ylabel="documents", title=f"{found['documents']:,} documents")
    FigureCanvasAgg(figure).print_png(stem + ".png")


def import_matplotlib():
    """matplotlib's Figure and FigureCanvasAgg; None if it is not installed. Takes a second the first time."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    return Figure, FigureCanvasAgg


def lengths_of(path):
    """The lengths that occur in a file of int32, ascending, and how often each does; 0 is left out."""
    import numpy

    total = {}
    with open(path, "rb") as file:
        while data := file.read(4 * SLICE):
            for length, count in zip(*map(list, numpy.unique(numpy.frombuffer(data, numpy.int32), return_counts=True))):
                total[int(length)] = total.get(int(length), 0) + int(count)
    total.pop(0, None)
    lengths = numpy.array(sorted(total), dtype=int)
    return lengths, numpy.array([total[length] for length in lengths.tolist()], dtype=int)


def percentile(lengths, counts, share):
    """The length that `share` percent of the documents do not exceed; of none, 0."""
    import numpy

    if not len(lengths):
        return 0
    order = numpy.cumsum(counts)
    return int(lengths[numpy.searchsorted(order, max(1, share / 100 * order[-1]))])


def duplicates(path):
    """Numbers in a file of uint64 that were there before, counted in shares that fit in memory."""
    import numpy

    count = path.stat().st_size // 8
    shares, distinct = 1 + count // SLICE, 0
    for share in range(shares):
        kept = [numpy.empty(0, numpy.uint64)]
        for begin in range(0, count, SLICE):
            part = numpy.fromfile(path, numpy.uint64, SLICE, offset=8 * begin)
            kept.append(part[part % numpy.uint64(shares) == share])
        distinct += len(numpy.unique(numpy.concatenate(kept)))
    return count - distinct
