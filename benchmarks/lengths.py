"""Row lengths of instruction data, in tokens, drawn by a seeded generator: for measuring packing without a download.

    python benchmarks/lengths.py

Fitted to published figures; the spreads (sigma of a log-normal distribution) are published nowhere and are ours:

- alpaca: GPT4-Alpaca as in table 1 of Wang et al., How Far Can Camels Go? (2023): 28.0 tokens of prompt and 161.8 of
  answer on average; and 30 of chat template.
- tulu: allenai/tulu-3-sft-mixture, whose card gives 2,914,250,827 bytes for 939,343 rows, so 3,102 a row; at 4.5
  bytes a token, about 680 tokens on average. A median of 410, because the longest rows hold most of the text.
"""

import math
import random

SIGMA = {"prompt": 0.7, "answer": 0.9, "conversation": 1.0}
SHORTEST = 8  # a chat template alone has as many


def _log_normal(generator, mean, sigma):
    return generator.lognormvariate(math.log(mean) - sigma * sigma / 2, sigma)


def _alpaca(generator):
    prompt, answer = _log_normal(generator, 28.0, SIGMA["prompt"]), _log_normal(generator, 161.8, SIGMA["answer"])
    return round(prompt + answer + 30)


def _tulu(generator):
    return round(_log_normal(generator, 680, SIGMA["conversation"]))


KINDS = {"alpaca": _alpaca, "tulu": _tulu}


def draw(kind, count, longest, seed=0):
    """`count` lengths of `kind`, those above `longest` drawn again, as --overlong drop would leave them out."""
    generator, found = random.Random(f"{kind} {seed}"), []
    while len(found) < count:
        length = max(SHORTEST, KINDS[kind](generator))
        if length <= longest:
            found.append(length)
    return found


if __name__ == "__main__":
    for kind in KINDS:
        lengths = sorted(draw(kind, 100_000, 1 << 30))
        at = [lengths[int(share * (len(lengths) - 1))] for share in (0.01, 0.25, 0.5, 0.75, 0.95, 0.99, 1)]
        print(f"{kind}: mean {sum(lengths) / len(lengths):.0f}, 1/25/50/75/95/99/100 % {at}")
