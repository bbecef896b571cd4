"""Make a tiny Hugging Face model of Llama 3's shape with random weights, to try the whole tutorial without a download.

From the repository root:

    python data/make_tiny_model.py --output_path hf_model/tiny-llama

Its tokenizer is a byte-level BPE trained on the sample texts, with Llama 3's special tokens and a chat template.
"""

import json
import sys
from pathlib import Path

# Nothing is installed: make the repository root importable, wherever the script is started from.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from nemo_tutorial import arguments, checkpoints, preflight, terminal

SAMPLE = Path(__file__).resolve().parent / "sample"
SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Llama 3's: contractions, words, numbers of up to three digits, punctuation, line ends, spaces.
WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def parse_args(argv=None):
    parser = arguments.Parser(__doc__)
    arguments.add_output(parser, "the Hugging Face folder")
    parser.add_argument("--vocab_size", type=arguments.positive, default=2048, help="[2048]")
    parser.add_argument("--hidden_size", type=arguments.positive, default=128, help="[128]")
    parser.add_argument("--intermediate_size", type=arguments.positive, default=384, help="[384]")
    parser.add_argument("--num_hidden_layers", type=arguments.positive, default=2, help="[2]")
    parser.add_argument("--num_attention_heads", type=arguments.positive, default=4, help="[4]")
    parser.add_argument("--num_key_value_heads", type=arguments.positive, default=2, help="[2]")
    parser.add_argument("--max_position_embeddings", type=arguments.positive, default=131072, help="[131072]")
    parser.add_argument("--tie_word_embeddings", action="store_true", help="one matrix for both embeddings")
    parser.add_argument("--seed", type=int, default=0, help="[0]")
    return parser.parse_args(argv)


def sample_texts():
    """The sample corpus and the instruction pairs, as strings."""
    for line in (SAMPLE / "corpus.jsonl").read_text(encoding="utf-8").splitlines():
        yield json.loads(line)["text"]
    for line in (SAMPLE / "instructions.jsonl").read_text(encoding="utf-8").splitlines():
        yield from json.loads(line).values()


def make_tokenizer(vocab_size):
    """A byte-level BPE of `vocab_size` entries, special tokens last, as Llama 3 has them."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(sample_texts(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    bos = tokenizer.token_to_id("<|begin_of_text|>")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def main(argv=None):
    args = parse_args(argv)
    problems = preflight.output_problems(args)
    if args.hidden_size % args.num_attention_heads:
        problems.append(
            f"--num_attention_heads {args.num_attention_heads} does not divide --hidden_size {args.hidden_size}"
        )
    if args.num_attention_heads % args.num_key_value_heads:
        problems.append(f"--num_key_value_heads {args.num_key_value_heads} does not divide the attention heads")
    if args.vocab_size < 256 + len(SPECIAL):
        problems.append(f"--vocab_size {args.vocab_size} has no room for 256 bytes and {len(SPECIAL)} special tokens")
    preflight.report(problems)

    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer(args.vocab_size)
    end = [tokenizer.convert_tokens_to_ids(token) for token in ("<|end_of_text|>", "<|eot_id|>")]
    config = LlamaConfig(
        vocab_size=args.vocab_size,
        hidden_size=args.hidden_size,
        intermediate_size=args.intermediate_size,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        num_key_value_heads=args.num_key_value_heads,
        max_position_embeddings=args.max_position_embeddings,
        tie_word_embeddings=args.tie_word_embeddings,
        rms_norm_eps=1e-5,
        rope_theta=500000.0,
        rope_scaling={
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    # Random norms as well: weights of 1, as new models have, would hide that a norm got lost on the way.
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, mean=1.0, std=0.05)
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=end)
    with checkpoints.published(args.output_path, args.overwrite) as partial:
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
    terminal.describe(
        "made",
        [
            ("folder", args.output_path),
            ("parameters", f"{model.num_parameters():,}"),
            ("vocabulary", f"{len(tokenizer)} tokens"),
        ],
    )


if __name__ == "__main__":
    main()
