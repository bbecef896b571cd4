"""One measured run of what a user might take instead of NeMo, for gpu.py: transformers with torch.compile, and peft."""

import gpu_measure
import torch
import transformers

MODELS = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32},
    "3b": {"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 28, "num_attention_heads": 24},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "tiny": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "num_attention_heads": 4},
}


def build(cell, device):
    """The model as its README would, for bf16 autocast: fp32 weights; frozen ones in bf16 beside an adapter in fp32."""
    sizes = MODELS[cell["model"]]
    config = transformers.LlamaConfig(
        vocab_size=2048 if cell["model"] == "tiny" else 128256,
        num_key_value_heads=2 if cell["model"] == "tiny" else 8,
        max_position_embeddings=131072,
        rope_theta=500000.0,
        tie_word_embeddings=cell["model"] != "8b",
        attn_implementation="sdpa",
        use_cache=False,
        **sizes,
    )
    lora = cell["kind"] == "lora"
    torch.set_default_dtype(torch.bfloat16 if lora else torch.float32)
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config)
    torch.set_default_dtype(torch.float32)
    if "liger" in cell["contestant"]:
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        # Only the loss: torch.compile fuses the rest itself.
        apply_liger_kernel_to_llama(
            rope=False, rms_norm=False, swiglu=False, fused_linear_cross_entropy=True, model=model
        )
    if lora:
        import peft

        model = peft.get_peft_model(model, peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    return model, config


def measure(cell, tokenizer):
    """Run one cell in this process; return its row."""
    torch.manual_seed(cell["seed"])
    torch.set_float32_matmul_precision("high")
    device = "cuda" if cell["accelerator"] == "gpu" else "cpu"
    model, config = build(cell, device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    count = sum(parameter.numel() for parameter in model.parameters())
    products = count - (0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size)
    adam = torch.optim.AdamW(trained, lr=cell["lr"], weight_decay=0.1, betas=(0.9, 0.95), fused=device == "cuda")
    forward = torch.compile(model) if "compile" in cell["contestant"] else model
    steps = gpu_measure.Steps(cell["steps"], cell["warmup"], cell["profile"])
    micro, accumulate = cell["mbs"], cell["gbs"] // cell["mbs"]
    samples = Samples(config.vocab_size, cell, steps.total * cell["gbs"])
    batches = iter(torch.utils.data.DataLoader(samples, micro, num_workers=2, pin_memory=device == "cuda"))
    for _ in range(steps.total):
        steps.begin()
        total = 0.0
        for _ in range(accumulate):
            batch = next(batches).to(device, non_blocking=True)
            with torch.autocast(device, dtype=torch.bfloat16):  # as transformers' Trainer with bf16
                loss = forward(input_ids=batch, labels=batch).loss / accumulate
            loss.backward()
            total = total + loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        adam.step()
        adam.zero_grad(set_to_none=True)
        steps.end(total)
    whole = sum(parameter.numel() for parameter in trained)
    flops = gpu_measure.flops_a_token(
        products, products if whole == count else whole, config.num_hidden_layers, config.hidden_size, cell["seq"]
    )
    row = {"parameters": count, "trained": whole, "flops": flops, "micro_batch_size": micro}
    return row | steps.result(cell["gbs"] * cell["seq"], flops)


class Samples(torch.utils.data.Dataset):
    """The contestants' tokens; the labels are the tokens, which transformers shifts."""

    def __init__(self, vocabulary, cell, count):
        self.draw, self.seq, self.count = (vocabulary, cell["data_seed"]), cell["seq"], count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return torch.from_numpy(gpu_measure.tokens(*self.draw, index, self.seq))
