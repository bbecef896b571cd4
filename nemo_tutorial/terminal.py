"""What a script says: derived values, warnings, problems and tables."""

import contextlib
import sys


def describe(title, rows):
    """Print `rows`, pairs of (name, value), under `title`; rows whose value is None are left out."""
    print(f"\n{title}")
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        if value is not None:
            print(f"  {name:<{width}}  {value}")
    sys.stdout.flush()


def warn(message):
    """Print a warning to standard error; the run goes on."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def fail(problems, code=2):
    """Print every problem to standard error and exit: 2 for a wrong command, 1 for a failure while running."""
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    print(f"error: {count}" + ("; nothing was started" if code == 2 else ""), file=sys.stderr)
    for problem in problems:
        print("  - " + problem.replace("\n", "\n    "), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


def number(value):
    """8030261248 -> '8.03 B', 123200 -> '123.2 K': a count as people read it."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if value >= limit:
            return f"{value / limit:.4g} {unit}"
    return str(value)


def gigabytes(size):
    """Bytes -> '16.06 GB' (10^9 bytes), smaller sizes in MB."""
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"


@contextlib.contextmanager
def progress(what, total):
    """A bar of bytes on a terminal: GB, GB/s and time left; gives the function to call with each number of bytes."""
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty()) as bar:
        yield bar.update


def table(header, rows):
    """Print `rows` (lists of strings) in columns under `header`."""
    widths = [max(len(str(row[i])) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, ["-" * width for width in widths], *rows]:
        print("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip())
    sys.stdout.flush()
