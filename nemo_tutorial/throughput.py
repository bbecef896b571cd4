"""What a token of training costs, and what a GPU could do at best: the arithmetic behind TFLOP/s and MFU.

Counted: the matrix products of forward and backward, 6 FLOP a parameter and token (4 for a frozen one, which needs no
gradient of its own), of a mixture's experts those that a token is routed to; and attention, 12 FLOP a layer, channel
of its heads and pair of tokens of which the later one sees the earlier one. Only real tokens, no padding. Not counted:
the input embedding (a look-up), norms, adapters, and what is computed again by recomputation. In fine-tuning the logits
of prompts are counted, though they are not made (answers.py): the model's arithmetic, not the run's.
"""

# Dense bf16 TFLOP/s by what the driver calls a GPU, from NVIDIA's data sheets; the first name found in it counts.
PEAKS = {
    "GB200": 2500,
    "B200": 2250,
    "H200 NVL": 835,
    "H200": 989,
    "GH200": 989,
    "H100 PCIe": 756,
    "H100 NVL": 835,
    "H100": 989,
    "A100": 312,
}


def peak(device):
    """Dense bf16 TFLOP/s of a GPU by its name, or None if it is not in the table."""
    return next((value for name, value in PEAKS.items() if name in device), None)


def cost(model, peft=None):
    """FLOP of training `model`: {"token": each, "pair": each pair of tokens of full layers, "window", "windowed"}.

    "windowed" is the part of a pair's FLOP in layers whose attention reaches back `window` tokens only.
    """
    embedding = 0 if model.tie_word_embeddings else model.vocab_size * model.hidden_size
    products = model.active_parameters - embedding
    pair = 12 * model.num_hidden_layers * model.num_attention_heads * model.head_dim
    windowed = (model.num_hidden_layers + 1) // 2 / model.num_hidden_layers if model.sliding_window else 0
    return {
        "token": (4 if peft else 6) * products,
        "pair": pair * (1 - windowed),
        "windowed": pair * windowed,
        "window": model.sliding_window,
    }


def pairs(length, window=0):
    """Pairs of tokens of one sample of which the later one attends to the earlier one, itself included."""
    reach = min(length, window or length)
    return reach * (reach + 1) // 2 + (length - reach) * reach


def flops(cost, lengths):
    """FLOP of one forward and backward of samples that attend each to itself, of the given lengths in tokens."""
    total = cost["token"] * sum(lengths)
    for length in lengths:
        total += cost["pair"] * pairs(length)
        if cost["windowed"]:
            total += cost["windowed"] * pairs(length, cost["window"])
    return total
