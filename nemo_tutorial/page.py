"""A run, or several, as one HTML page that needs nothing else: no script, font or picture from elsewhere.

Curves are SVG of lines only, stretched to the width of the page; numbers and words beside them are HTML, so that they
keep their size on a phone. Colours follow the reader's light or dark setting.
"""

import html
import json
import math
import statistics
import time

from nemo_tutorial import metrics

POINTS = 600  # of a curve, at most: what a screen shows, and what keeps the page small
STYLE = """
:root { color-scheme: light dark; --bg: #f6f7f9; --card: #fff; --text: #1b1f24; --dim: #5b6470; --line: #dfe3e8;
  --grid: #e9ecf0; --c0: #2563eb; --c1: #c2570c; --c2: #0f8a6d; --c3: #9333ea; --c4: #b8225b; --c5: #57606a;
  --good: #18794e; --bad: #c4272d; --code: #f1f3f6; }
@media (prefers-color-scheme: dark) { :root { --bg: #0f1216; --card: #171b21; --text: #e7eaee; --dim: #9aa4b1;
  --line: #2a3039; --grid: #242a32; --c0: #7aa8ff; --c1: #ffa657; --c2: #4fd1ac; --c3: #c79bff; --c4: #ff8fb1;
  --c5: #aab4c0; --good: #5bd0a0; --bad: #ff8a8a; --code: #11151a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--bg); color: var(--text); overflow-wrap: anywhere;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", "Noto Sans CJK TC", "PingFang TC",
    "Microsoft JhengHei", sans-serif; }
main { max-width: 1240px; margin: 0 auto; padding: 24px 20px 48px; }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -.01em; }
h2 { font-size: 18px; margin: 36px 0 12px; }
h3 { font-size: 14px; margin: 0; font-weight: 600; }
p { margin: 0 0 8px; } .dim { color: var(--dim); } .small { font-size: 13px; }
.badge { display: inline-block; padding: 1px 10px; border-radius: 99px; font-size: 13px; font-weight: 600;
  border: 1px solid currentColor; vertical-align: 4px; margin-left: 8px; }
.good { color: var(--good); } .bad { color: var(--bad); }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(196px, 1fr)); gap: 12px; margin-top: 20px; }
.tile, .card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.tile b { display: block; font-size: 21px; line-height: 1.3; font-weight: 650; font-variant-numeric: tabular-nums; }
.tile span { font-size: 13px; color: var(--dim); }
.charts { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: 12px; }
.wide { grid-column: 1 / -1; }
.head { display: flex; flex-wrap: wrap; gap: 2px 16px; align-items: baseline; margin-bottom: 10px; }
.key { font-size: 13px; color: var(--dim); display: inline-flex; align-items: center; gap: 6px; }
.key i { width: 14px; height: 3px; border-radius: 2px; background: var(--c); }
.plot { display: grid; grid-template: var(--height, 170px) auto / auto 1fr; column-gap: 8px; }
.y { position: relative; min-width: 34px; font-size: 12px; color: var(--dim); font-variant-numeric: tabular-nums; }
.y span { position: absolute; right: 0; transform: translateY(-50%); white-space: nowrap; }
.y em { visibility: hidden; font-style: normal; white-space: nowrap; }
.x { position: relative; grid-column: 2; height: 20px; font-size: 12px; color: var(--dim); margin-top: 4px; }
.x span { position: absolute; transform: translateX(-50%); white-space: nowrap; }
.x span:first-child { transform: none; } .x span:last-child { transform: translateX(-100%); }
.area { position: relative; touch-action: pan-y; }
.area svg { position: absolute; inset: 0; width: 100%; height: 100%; overflow: visible; }
svg * { vector-effect: non-scaling-stroke; fill: none; }
.grid { stroke: var(--grid); } .curve { stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
.raw { stroke: var(--c); stroke-width: 1; opacity: .35; }
.dots { stroke: var(--c); stroke-width: 7; stroke-linecap: round; }
.cursor { position: absolute; inset: 0 auto 0 0; width: 1px; background: var(--dim); display: none;
  pointer-events: none; }
.tip { position: absolute; top: 0; z-index: 2; display: none; pointer-events: none; background: var(--card);
  border: 1px solid var(--line); border-radius: 6px; padding: 4px 8px; font-size: 12px; white-space: pre;
  box-shadow: 0 2px 8px #0003; font-variant-numeric: tabular-nums; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 5px 14px 5px 0; border-top: 1px solid var(--line); }
tr:first-child > * { border-top: 0; } th { font-weight: 500; color: var(--dim); width: 1%; white-space: nowrap; }
.facts th { white-space: normal; overflow-wrap: normal; min-width: 110px; max-width: 45vw; }
.scroll { overflow-x: auto; } .numbers th, .numbers td { width: auto; white-space: nowrap; }
.flags { columns: 2; column-gap: 28px; } .flags div { display: flex; justify-content: space-between; gap: 12px;
  border-bottom: 1px solid var(--line); padding: 4px 0; break-inside: avoid; }
.flags span { color: var(--dim); flex: none; max-width: 75%; } .flags b { font-weight: 500; text-align: right; }
ol.chain { list-style: none; margin: 0; padding: 0; display: grid; gap: 26px; }
ol.chain li { position: relative; } ol.chain li + li::before { content: "↓"; position: absolute; top: -25px; left: 14px;
  color: var(--dim); }
ol.chain h3 { margin-bottom: 4px; }
.talk { display: grid; grid-template-columns: 1fr 1fr; gap: 10px 20px; margin-top: 8px; }
.talk + .talk { margin-top: 10px; } .talks { display: grid; gap: 12px; }
.said { white-space: pre-wrap; border-left: 3px solid var(--line); padding-left: 10px; }
.said.after { border-color: var(--c0); }
pre { background: var(--code); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; margin: 0 0 10px;
  font: 12.5px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; white-space: pre-wrap; overflow-x: auto; }
details { margin-top: 10px; } summary { cursor: pointer; color: var(--dim); }
details > *:not(summary) { margin-top: 10px; }
@media (max-width: 720px) { main { padding: 16px 12px 32px; } .charts, .talk { grid-template-columns: minmax(0, 1fr); }
  .flags { columns: 1; } .tiles { grid-template-columns: 1fr 1fr; gap: 8px; } h1 { font-size: 21px; }
  .tile b { font-size: 18px; } }
"""
SCRIPT = """
for (const area of document.querySelectorAll('.area')) {
  const {first, last, curves} = JSON.parse(area.dataset.values);
  const cursor = area.querySelector('.cursor'), tip = area.querySelector('.tip');
  const hide = () => { cursor.style.display = tip.style.display = 'none'; };
  area.addEventListener('pointermove', event => {
    const box = area.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    const wanted = first + at * (last - first);
    const near = curves.map(c => c.points.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a));
    const step = near.reduce((a, b) => Math.abs(b[0] - wanted) < Math.abs(a[0] - wanted) ? b : a)[0];
    const x = last > first ? (step - first) / (last - first) : 0.5;
    tip.textContent = ['step ' + step.toLocaleString('en')].concat(
      curves.flatMap((c, i) => near[i][0] === step ? [c.name + '  ' + near[i][1]] : [])).join('\\n');
    cursor.style.display = tip.style.display = 'block';
    cursor.style.left = x * 100 + '%';
    const right = x * box.width + 10, left = right - 20 - tip.offsetWidth;
    tip.style.left = (right + tip.offsetWidth > box.width ? Math.max(0, left) : right) + 'px';
  });
  area.addEventListener('pointerleave', hide);
}
"""


def text(value):
    """A value as HTML shows it; None is a dash."""
    return "–" if value is None else html.escape(str(value))


def document(title, body):
    """A whole page."""
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{text(title)}</title>\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<link rel="icon" href="data:,">\n'  # else a browser asks the server for one
        f"<style>{STYLE}</style></head>\n<body><main>\n{body}\n</main><script>{SCRIPT}</script></body></html>\n"
    )


def number(value, form="{:.4g}"):
    """A number as it is written beside a curve or in a tile."""
    if value is None or not math.isfinite(value):
        return "–" if value is None else str(value)
    return form.format(value)


# Curves.


def ticks(low, high, count=4):
    """About `count` round numbers between `low` and `high`, both finite and low < high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def thin(points, limit=POINTS):
    """At most `limit` of [(step, value), ...]: of each stretch of steps the lowest and the highest."""
    if len(points) <= limit:
        return points
    size = math.ceil(len(points) / (limit // 2))
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        ends = {min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])}
        found += sorted(ends)
    return found


def smooth(points):
    """The mean of a fiftieth of the points around each: [(step, value), ...]."""
    half = len(points) // 100
    values = [value for _, value in points]
    return [(step, statistics.fmean(values[max(0, i - half) : i + half + 1])) for i, (step, _) in enumerate(points)]


def chart(title, curves, form="{:.4g}", zero=False, wide=False, log=False, noisy=True):
    """One card with curves: `curves` is [(name, [(step, value), ...], number of its colour, dots?), ...].

    `zero` begins the axis at 0; `log` is for values of many sizes; of `noisy` values the mean is drawn over them.
    "" if no curve has a point.
    """
    curves = [
        (name, [(step, value) for step, value in points if value is not None and math.isfinite(value)], colour, dots)
        for name, points, colour, dots in curves
    ]
    if log:
        curves = [(name, [p for p in points if p[1] > 0], colour, dots) for name, points, colour, dots in curves]
    curves = [curve for curve in curves if curve[1]]
    if not curves:
        return ""
    scale = math.log10 if log else float
    steps = [step for _, points, _, _ in curves for step, _ in points]
    values = [scale(value) for _, points, _, _ in curves for _, value in points]
    first, last = min(steps), max(steps)
    low, high = min(values), max(values)
    if zero:
        low = min(0, low)
    if high - low < 1e-12:
        low, high = (low - abs(low) * 0.1 - 1e-3, high + abs(high) * 0.1 + 1e-3)
    margin = (high - low) * 0.06
    low, high = (low if zero and low == 0 else low - margin), high + margin

    def x(step):
        return round(1000 * (step - first) / (last - first), 1) if last > first else 500

    def y(value):
        return round(1000 * (high - scale(value)) / (high - low), 1)

    marks = ticks(low, high)
    labels = [10**mark if log else mark for mark in marks]
    if len({number(label, form) for label in labels}) < len(labels):
        form = "{:.6g}"
    names = [number(label, "{:.2g}" if log else form) for label in labels]
    places = [round(100 * (high - mark) / (high - low), 2) for mark in marks]
    drawn = "".join(f'<path class="grid" d="M0 {10 * place:.1f}H1000"/>' for place in places)
    keys, hover = [], []
    for name, points, colour, dots in curves:
        kept = thin(points)
        line = "M" + "L".join(f"{x(step)} {y(value)}" for step, value in kept)
        if noisy and len(points) >= 100 and not dots:
            even = thin(smooth(points))
            drawn += f'<path class="raw" style="--c:var(--c{colour})" d="{line}"/>'
            line = "M" + "L".join(f"{x(step)} {y(value)}" for step, value in even)
        drawn += f'<path class="curve" style="--c:var(--c{colour})" d="{line}"/>'
        if dots or len(kept) == 1:
            spots = "".join(f"M{x(step)} {y(value)}h0" for step, value in kept)
            drawn += f'<path class="dots" style="--c:var(--c{colour})" d="{spots}"/>'
        keys.append(f'<span class="key" style="--c:var(--c{colour})"><i></i>{text(name)}</span>')
        shown = [[step, number(value, "{:.5g}")] for step, value in kept]
        hover.append({"name": name, "points": shown})
    widest = max(names, key=len)
    count = 5 if wide else 3
    at = [mark for mark in ticks(first, last, count) if mark == int(mark)] if last > first else []
    at = [first, *(m for m in at if 0.1 < (m - first) / (last - first) < 0.75), last] if last > first else [first]
    words = [f"{int(step):,}" for step in at[:-1]] + [f"step {int(at[-1]):,}"]
    axis = "".join(f'<span style="left:{x(step) / 10}%">{word}</span>' for step, word in zip(at, words))
    data = html.escape(json.dumps({"first": first, "last": last, "curves": hover}), quote=True)
    ys = "".join(f'<span style="top:{place}%">{text(name)}</span>' for place, name in zip(places, names))
    return (
        f'<figure class="card{" wide" if wide else ""}" style="margin:0{";--height:260px" if wide else ""}">'
        f'<div class="head"><h3>{text(title)}</h3>{"".join(keys) if len(keys) > 1 else ""}</div>'
        f'<div class="plot"><div class="y"><em>{text(widest)}</em>{ys}</div>'
        f'<div class="area" data-values="{data}"><svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" '
        f'aria-label="{text(title)}">{drawn}</svg><div class="cursor"></div><div class="tip"></div></div>'
        f'<div class="x">{axis}</div></div></figure>'
    )


def points(lines, name):
    """A value over the steps that have it."""
    return [(line["step"], line[name]) for line in lines if name in line]


def uneven(lines, name):
    """Whether a value takes sizes so different that a linear axis would hide most of it."""
    values = [line[name] for line in lines if line.get(name, 0) > 0 and math.isfinite(line[name])]
    return bool(values) and max(values) > 10 * statistics.median(values)


def charts(training, validation):
    """The curves of one run."""
    # Of a run's first step the speed is that of starting up.
    warm = training[1:] or training
    drawn = [
        chart(
            "Loss (nats a token)",
            [("training", points(training, "loss"), 0, False), ("validation", points(validation, "val_loss"), 1, True)],
            wide=True,
        ),
        chart(
            "Learning rate",
            [("learning rate", points(training, "learning_rate"), 0, False)],
            "{:.3g}",
            zero=True,
            noisy=False,
        ),
        chart(
            "Gradient norm",
            [("gradient norm", points(training, "grad_norm"), 0, False)],
            log=uneven(training, "grad_norm"),
            zero=not uneven(training, "grad_norm"),
        ),
        chart(
            "Throughput (tokens a second and GPU)",
            [("tokens/s/GPU", points(warm, "tokens_per_second_per_gpu"), 2, False)],
            "{:,.0f}",
            zero=True,
        ),
        chart("Memory (GB)", [("memory", points(training, "memory_gb"), 3, False)], zero=True, noisy=False),
    ]
    return "".join(drawn)


# The page's other parts.


def tile(value, words):
    """A number with what it is."""
    return f'<div class="tile"><b>{text(value)}</b><span>{text(words)}</span></div>'


def arrow(before, after, form):
    """'7.66 → 4.81', or what of it is known."""
    return number(after, form) if before is None else f"{number(before, form)} → {number(after, form)}"


def tiles(found):
    """The numbers that are asked for first."""
    steps = f"{found['steps']:,}" + (f" / {found['max_steps']:,}" if found["max_steps"] else "")
    shown = [
        (steps, "steps"),
        (arrow(found["loss_first"], found["loss_last"], "{:.3f}"), "training loss"),
        (arrow(found["validation_loss_start"], found["validation_loss_end"], "{:.3f}"), "validation loss"),
        (arrow(found["perplexity_start"], found["perplexity_end"], "{:.4g}"), "perplexity, held-out set"),
        (number(found["tokens"], "{:,}"), "tokens trained on"),
        (number(found["tokens_per_second_per_gpu"], "{:,.0f}"), "tokens/s/GPU, median"),
        (number(found["tflops_per_gpu"], "{:.1f}"), "TFLOP/s a GPU, median"),
        (number(found["mfu"], "{:.1%}"), "MFU, of dense bf16"),
        (number(found["memory_gb_peak"], "{:.1f} GB"), "memory, peak" if found["mfu"] else "memory"),
        (metrics.duration(found["training_seconds"]), "in training steps"),
    ]
    return '<div class="tiles">' + "".join(tile(*one) for one in shown if one[0] != "–") + "</div>"


def facts(rows):
    """A two-column table of (name, value); what is not known is left out."""
    rows = [(name, value) for name, value in rows if value not in (None, "")]
    body = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in rows)
    return f'<table class="facts">{body}</table>' if rows else ""


def lineage(chain, checkpoint):
    """Where the weights and the data come from, first things first; last, this run with its last checkpoint."""
    chain = [*chain[:-1], {**chain[-1], "rows": [*chain[-1]["rows"], ("last checkpoint", checkpoint)]}] if chain else []
    items = "".join(f'<li class="card"><h3>{text(one["title"])}</h3>{facts(one["rows"])}</li>' for one in chain)
    return f'<ol class="chain">{items}</ol>'


def talks(samples):
    """What was said to each prompt at the first and the last validation, and at all of them if there are more."""
    if not samples:
        return ""
    first, last = samples[0], samples[-1]
    earlier = {one["prompt"]: one for one in first[1]}
    cards = []
    for one in last[1]:
        before = earlier.get(one["prompt"])

        def said(step, reply, kind=""):
            if reply is None:
                return ""
            cut = "" if reply["ended"] else ' <span class="dim">…</span>'
            when = "before training" if step == 0 else f"after step {step:,}"
            return (
                f'<div><p class="small dim">{when}</p>'
                f'<div class="said {kind}" dir="auto">{text(reply["reply"])}{cut}</div></div>'
            )

        pair = said(first[0], before) if len(samples) > 1 else ""
        between = ""
        if len(samples) > 2:
            rest = [
                said(step, next((r for r in replies if r["prompt"] == one["prompt"]), None))
                for step, replies in samples[1:-1]
            ]
            between = f'<details><summary class="small">between</summary>{"".join(rest)}</details>'
        cards.append(
            f'<div class="card"><h3 dir="auto">{text(one["prompt"])}</h3>'
            f'<div class="talk">{pair}{said(last[0], one, "after")}</div>{between}</div>'
        )
    words = "Greedy, by the model in training. “…” is cut off at --generate_tokens."
    return f'<h2>What it says</h2><p class="small dim">{words}</p><div class="talks">{"".join(cards)}</div>'


def flags(found):
    """The resolved configuration: every flag that has a value."""
    shown = {n: v for n, v in found["flags"].items() if v not in (None, False, "") and not n.startswith("_")}
    rows = "".join(f"<div><span>{text(name)}</span><b>{text(plain(v))}</b></div>" for name, v in shown.items())
    return f'<div class="card flags">{rows}</div>'


def plain(value):
    """A flag's value as it could be typed."""
    if isinstance(value, list):
        return " ".join(map(str, value))
    return f"{value:.10g}" if isinstance(value, float) else value


def validations(lines):
    """Each validation, as a table."""
    rows = "".join(
        f"<tr><td>{line['step']:,}</td><td>{number(line['val_loss'], '{:.4f}')}</td>"
        f"<td>{number(metrics.perplexity(line['val_loss']), '{:.5g}')}</td></tr>"
        for line in lines
    )
    head = "<tr><th>after step</th><th>validation loss</th><th>perplexity</th></tr>"
    table = f'<table class="numbers">{head}{rows}</table>'
    return f"<details><summary>Validations in numbers</summary><div class='card scroll'>{table}</div></details>"


def broken(command):
    """A command with each flag on a line of its own, to read and to copy."""
    return command.replace(" --", " \\\n    --")


def moment(seconds):
    """Seconds since 1970 as a date and time in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds)) if seconds else None


def run(found, training, validation, samples, recipe):
    """The page of one run: `found` as report.summary has it, its lines, its samples, its recipe as text or None."""
    good = found["result"] == "done"
    colour = "good" if good else "bad"
    where = f"{found['gpus']} × {found['device']}" if found["device"] else None
    if found["device"] == "CPU":
        where = f"{found['gpus']} process{'es' if found['gpus'] > 1 else ''} without a GPU"
    when = f"{moment(found['began']) or '?'} – {moment(found['ended'])}"
    about = " · ".join(str(part) for part in (found["stage"], where, when) if part)
    body = [
        f'<h1>{text(found["run"])}<span class="badge {colour}">{text(found["result"])}</span></h1>',
        f'<p class="dim">{text(about)}</p>',
        tiles(found),
        f'<h2>Curves</h2><div class="charts">{charts(training, validation)}</div>' if training else "",
        validations(validation) if validation else "",
        talks(samples),
        f"<h2>Where it comes from</h2>{lineage(found['lineage'], found['last_checkpoint'])}",
        f"<h2>Configuration</h2>{flags(found)}",
        f"<details><summary>The whole NeMo recipe</summary><pre>{text(recipe)}</pre></details>" if recipe else "",
        "<h2>To do it again</h2>",
        *(f"<pre>{text(broken(command))}</pre>" for command in found["commands"]),
        f'<div class="card">{facts(found["versions"].items())}</div>',
        f'<p class="small dim" style="margin-top:16px">{text(counting(found))}</p>',
    ]
    return document(f"{found['run']}: {found['result']}", "\n".join(part for part in body if part))


def counting(found):
    """How the numbers are counted, in words."""
    return (
        "Loss is in nats a token; perplexity is e to the validation loss, over the same held-out batches each time, "
        "the first time before the first step. Tokens are real ones, without padding. Medians leave out the run's "
        "first step, and no time of validation or saving is in them. FLOP: 6 a parameter in matrix products and token "
        "(4 for frozen ones), and 12 a layer, head channel and pair of tokens that attend; nothing for "
        "recomputation. MFU is of the GPU's dense bf16 peak. Memory is rank 0's peak on a GPU, its resident size on a "
        "CPU; at validations the largest of all ranks."
    )


def comparison(found, curves, table, different):
    """The page of several runs: summaries, (training, validation) lines, a table (header, rows), flags that differ."""
    many = [(one["run"], *lines, i % 6) for i, (one, lines) in enumerate(zip(found, curves))]

    def over(title, which, name, **options):
        drawn = [
            (
                run,
                points((training[1:] or training) if name in SPEEDS else (training, validation)[which], name),
                c,
                which,
            )
            for run, training, validation, c in many
        ]
        return chart(title, drawn, **options)

    header, rows = table
    head = "<tr>" + "".join(f"<th>{text(name)}</th>" for name in header) + "</tr>"
    body = "".join("<tr>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    parts = [
        f"<h1>{text(' · '.join(one['run'] for one in found))}</h1><p class='dim'>{len(found)} runs compared</p>",
        f'<div class="card scroll" style="margin-top:16px"><table class="numbers">{head}{body}</table></div>',
        '<h2>Curves</h2><div class="charts">',
        over("Training loss (nats a token)", 0, "loss", wide=True),
        over("Validation loss", 1, "val_loss"),
        over("Learning rate", 0, "learning_rate", zero=True, noisy=False),
        over("Gradient norm", 0, "grad_norm", log=any(uneven(t, "grad_norm") for _, t, _, _ in many)),
        over("Throughput (tokens a second and GPU)", 0, "tokens_per_second_per_gpu", form="{:,.0f}", zero=True),
        "</div>",
    ]
    if different:
        head = "<tr><th>flag</th>" + "".join(f"<th>{text(one['run'])}</th>" for one in found) + "</tr>"
        body = "".join(
            f"<tr><td>--{text(name)}</td>" + "".join(f"<td>{text(value)}</td>" for value in values) + "</tr>"
            for name, values in different
        )
        parts.append(
            f'<h2>Flags that differ</h2><div class="card scroll"><table class="numbers">{head}{body}</table></div>'
        )
    return document("runs compared", "\n".join(parts))


SPEEDS = ("tokens_per_second_per_gpu", "tflops_per_gpu", "seconds")
