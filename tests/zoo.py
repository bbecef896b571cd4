"""Small tokenizers of the kinds that models have, trained on the sample texts, to compare ids on."""

import importlib.util
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("llama3", "llama2", "gpt2", "bert", "t5", "normalized")


def made_tiny():
    spec = importlib.util.spec_from_file_location("make_tiny_model", ROOT / "data/make_tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def make(kind, folder):
    """Write the tokenizer `kind` into `folder`, as Hugging Face has it."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast, GPT2TokenizerFast, LlamaTokenizerFast, PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import generate_merges

    folder = Path(folder)
    folder.mkdir(parents=True)
    texts = list(made_tiny().sample_texts())
    if kind == "llama3":
        made_tiny().make_tokenizer(2048).save_pretrained(folder)
    elif kind == "llama2":  # SentencePiece: tokenizer.model, and the slow class beside the fast one
        import sentencepiece

        (folder / "texts").write_text("\n".join(texts), encoding="utf-8")
        sentencepiece.SentencePieceTrainer.train(
            input=str(folder / "texts"),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=2000,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            character_coverage=0.99,
            minloglevel=2,
        )
        pieces = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
        vocabulary = {pieces.id_to_piece(i): i for i in range(len(pieces))}
        scores = {pieces.id_to_piece(i): pieces.get_score(i) for i in range(len(pieces))}
        merges = generate_merges(vocabulary, scores)
        tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
        model = str(folder / "tokenizer.model")
        LlamaTokenizerFast(tokenizer_object=tokenizer, vocab_file=model).save_pretrained(folder)
        (folder / "texts").unlink()
        (folder / "tokenizer.vocab").unlink()
    elif kind == "gpt2":  # tokens that were added later, with and without spaces of their own
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(vocab_size=1500, initial_alphabet=alphabet, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        tokenizer.add_special_tokens(["<|endoftext|>"])
        tokenizer.add_tokens([AddedToken("<left>", lstrip=True), AddedToken("<right>", rstrip=True)])
        tokenizer.add_tokens([AddedToken("whole", single_word=True), AddedToken("玉山", normalized=True)])
        GPT2TokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    elif kind == "bert":
        tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
        tokenizer.normalizer = normalizers.BertNormalizer()
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
        trainer = trainers.WordPieceTrainer(vocab_size=1500, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        (folder / "vocab.txt").write_text(
            "\n".join(sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)), encoding="utf-8"
        )
        BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    else:
        unigram = kind == "t5"
        tokenizer = Tokenizer(models.Unigram() if unigram else models.BPE(unk_token="<unk>", byte_fallback=True))
        tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        special = ["<unk>", "</s>", "<pad>"]
        if unigram:
            trainer = trainers.UnigramTrainer(
                vocab_size=3000, special_tokens=special, unk_token="<unk>", show_progress=False
            )
        else:
            special += [f"<0x{byte:02X}>" for byte in range(256)]
            trainer = trainers.BpeTrainer(vocab_size=1800, special_tokens=special, show_progress=False)
        tokenizer.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer, eos_token="</s>", unk_token="<unk>", pad_token="<pad>"
        ).save_pretrained(folder)
    return folder
