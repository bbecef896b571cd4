"""summary.json and report.html from a run's record: what they say, and how a real browser shows them."""

import json
import math
import re
import subprocess
import sys

import pytest
from browser import browser  # noqa: F401  a fixture
from conftest import ROOT

from nemo_tutorial import metrics, report

TOKEN = "hf_canary77"


def line(step, total, rate=1.0):
    loss = 3.2 + 6 * math.exp(-5 * step / total) + 0.08 * math.sin(step * 12.9)
    return {
        "step": step,
        "loss": loss,
        "learning_rate": rate * 1e-5 * min(1, step / 50) * (1 - step / total),
        "grad_norm": 1 + abs(math.sin(step)) + (40 if step == 7 else 0),
        "seconds": 9.0 if step == 1 else 1.02,
        "tokens": 65536,
        "tokens_per_second_per_gpu": 900.0 if step == 1 else 8000 + 50 * math.sin(step),
        "tflops_per_gpu": 401.5,
        "mfu": 0.406,
        "memory_gb": 61.234,
    }


@pytest.fixture(scope="module")
def make_run(tmp_path_factory):
    """Make the record of a run as the ranks and the launcher leave it."""

    def make(name, steps=2000, every=200, **flags):
        run = tmp_path_factory.mktemp("runs") / name
        (run / "record").mkdir(parents=True)
        flags = {"max_steps": steps, "lr": 1e-5, "dataset_path": ["data/x"], "experiment": name, **flags}
        start = {
            "flags": flags,
            "versions": {"torch": "2.13.0"},
            "command": f"python pretraining/pretrain.py -E {name}",
        }
        history = {"stage": "pretraining", "restored_from": None, "starts": [{**start, "began": 1.79e9}]}
        (run / "record/run.json").write_text(json.dumps(history))
        (run / "record/machine.json").write_text(json.dumps({"device": "NVIDIA H200", "ranks": 8}))
        (run / "record/config.yaml").write_text("_target_: nemo.<recipe>\n" * 200)
        lines = [{"step": 0, "val_loss": 9.2, "seconds": 3.0, "memory_gb": 20.0}]
        for step in range(1, steps + 1):
            lines.append(line(step, steps))
            if step % every == 0:
                lines.append({"step": step, "val_loss": lines[-1]["loss"] + 0.1, "seconds": 3.0, "memory_gb": 62.0})
        metrics.append(metrics.path(run), lines)
        asked = ["台灣最高的山是哪一座？", "<script>alert(1)</script> & so on"]
        talk = [
            {
                "step": step,
                "replies": [
                    {"prompt": p, "reply": f"{p} {step} " + "很長的回答 " * 30, "ended": step > 0} for p in asked
                ],
            }
            for step in range(0, steps + 1, every)
        ]
        metrics.append(run / "record/samples.jsonl", talk)
        return run

    return make


@pytest.fixture(scope="module")
def run(make_run):
    made = make_run("llama31_pretraining")
    report.write(made, "done")
    return made


def test_summary(run):
    found = json.loads((run / "summary.json").read_text())
    assert (found["result"], found["steps"], found["max_steps"]) == ("done", 2000, 2000)
    assert found["perplexity_start"] == pytest.approx(math.exp(9.2), rel=1e-4)
    assert found["perplexity_end"] == pytest.approx(math.exp(found["validation_loss_end"]), rel=1e-4)
    assert found["tokens"] == 2000 * 65536
    assert found["tokens_per_second_per_gpu"] == pytest.approx(8000, abs=51), "the first step's is not in it"
    assert (found["memory_gb_peak"], found["mfu"], found["gpus"]) == (62.0, 0.406, 8)


def test_a_step_done_again_counts_once(make_run):
    """Killed in the middle of a line, gone on from step 40: the later values are those of the run."""
    run = make_run("again", steps=60, every=20)
    with open(metrics.path(run), "a") as file:
        file.write('{"step": 61, "lo')  # cut off
    metrics.end_line(metrics.path(run))
    metrics.append(metrics.path(run), [{**line(step, 60), "loss": 1.0} for step in range(41, 51)])
    training, _ = metrics.steps(metrics.read(run))
    assert [one["step"] for one in training] == list(range(1, 61))
    assert [one["loss"] == 1.0 for one in training] == [40 < one["step"] <= 50 for one in training]


def test_the_commands_have_no_tokens():
    argv = [str(ROOT / "pretraining/pretrain.py"), "--hf_token", TOKEN, "--wandb-token=" + TOKEN, "-E", "a b"]
    assert report.command(argv) == "python pretraining/pretrain.py -E 'a b'"


def test_numbers_that_are_none(make_run):
    """A run that diverged, and one that wrote nothing yet, have a page and a summary all the same."""
    run = make_run("diverged", steps=10, every=5)
    metrics.append(metrics.path(run), [{"step": 10, "loss": math.nan, "grad_norm": math.inf}])
    assert report.write(run, "failed")["loss_last"] is not None
    found = json.loads((run / "summary.json").read_text())
    assert found["loss_last"] is None and found["result"] == "failed"
    metrics.path(run).unlink()
    assert report.write(run)["steps"] == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_page_in_a_browser(run, browser, width, scheme):  # noqa: F811
    """Opens without a complaint and without asking for anything, fits the width, and can be read."""
    page = run / "report.html"
    assert page.stat().st_size < 2e6
    browser.open(page, width, scheme)
    assert browser.complaints() == []
    assert browser.requests() == [page.absolute().as_uri()]
    assert browser.value("document.documentElement.scrollWidth") <= width
    assert browser.value("document.querySelectorAll('figure svg').length") == 5
    # Nothing is cut off at its sides, and no text is smaller than 12 pixels.
    outside = (
        "[...document.querySelectorAll('main *')].filter(e => !e.closest('.scroll, svg') && e.getClientRects().length"
        f" && (e.getBoundingClientRect().right > {width} || e.getBoundingClientRect().left < 0)).map(e => e.outerHTML)"
    )
    assert browser.value(outside) == []
    small = "[...document.querySelectorAll('main *')].filter(e => parseFloat(getComputedStyle(e).fontSize) < 12).length"
    assert browser.value(small) == 0
    # Marks of an axis do not lie over each other.
    overlap = (
        "[...document.querySelectorAll('.x')].filter(x => {"
        " const s = [...x.children].map(e => e.getBoundingClientRect());"
        " return s.some((b, i) => i && b.left < s[i-1].right); }).length"
    )
    assert browser.value(overlap) == 0
    for where in ("body", ".dim", ".said", "h3"):
        assert contrast(browser, where) > 4.5, where
    # The text of a prompt is text.
    assert "<script>alert(1)</script>" in browser.value("document.body.innerText")


def contrast(browser, selector):  # noqa: F811
    """WCAG's ratio of the first such element's colour to that of what is behind it."""
    colours = browser.value(
        f"(() => {{ let e = document.querySelector('{selector}'); const c = getComputedStyle(e).color; let b;"
        " do { b = getComputedStyle(e).backgroundColor; e = e.parentElement } while (b === 'rgba(0, 0, 0, 0)');"
        " return [c, b] })()"
    )

    def luminance(colour):
        parts = [int(part) / 255 for part in re.findall(r"\d+", colour)[:3]]
        parts = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    dark, light = sorted(map(luminance, colours))
    return (light + 0.05) / (dark + 0.05)


def test_pointing_at_a_curve_names_the_values(run, browser):  # noqa: F811
    browser.open(run / "report.html", 1400, "light")
    box = browser.value(
        "(() => { const b = document.querySelector('.area').getBoundingClientRect();"
        " return [b.left, b.top, b.width, b.height] })()"
    )
    left, top, width, height = box
    browser.call("Input.dispatchMouseEvent", type="mouseMoved", x=left + width / 2, y=top + height / 2)
    said = browser.value("document.querySelector('.tip').innerText")
    assert re.match(r"step [\d,]+\n(training|validation)  \d", said), said
    assert browser.value("getComputedStyle(document.querySelector('.tip')).display") == "block"


def test_runs_compared(make_run, run, browser, tmp_path):  # noqa: F811
    other = make_run("other", steps=1000, lr=2e-5)
    command = [sys.executable, "-m", "nemo_tutorial.report", str(run), str(other)]
    page = tmp_path / "both.html"
    done = subprocess.run([*command, "--output_path", str(page)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [one.split() for one in done.stdout.splitlines()]
    assert any(row[:2] == ["llama31_pretraining", "done"] for row in rows)
    assert ["--lr", "1e-05", "2e-05"] in rows and ["--max_steps", "2000", "1000"] in rows
    for width in (400, 1400):
        browser.open(page, width, "light")
        assert browser.complaints() == [] and browser.requests() == [page.as_uri()]
        assert browser.value("document.documentElement.scrollWidth") <= width
    again = subprocess.run([*command, "--output_path", str(page)], cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2 and "--overwrite" in again.stderr
    wrong = subprocess.run([*command, str(tmp_path)], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2 and "is not a run" in wrong.stderr and "Traceback" not in wrong.stderr


def test_a_long_run_stays_small(make_run):
    """20,000 steps: under 2 MB, and the peaks of the curves are still there."""
    run = make_run("long", steps=20000, every=1000)
    report.write(run, "done")
    assert (run / "report.html").stat().st_size < 1e6
