"""Text to token ids: Hugging Face's tokenizer as the reference, and the fastest library that gives the same ids.

Compared were `tokenizers`, `gigatoken`, `fastokens` and `tiktoken` (benchmarks/README.md). fastokens is the choice: the
fastest, with a cache that stops growing, and without gigatoken's other ids for the newest Unicode letters.
"""

import hashlib
import itertools
import json
import os
from dataclasses import dataclass, field
from pathlib import Path

# What tokenizers disagree on, if on anything: spaces, line ends, contractions, scripts' digits, marks, emoji, controls.
AWKWARD = [
    "",
    " ",
    "  a   b\t\tc \n\n d\r\n\re\u00a0f\u3000g\u2028h\x85i\u200bj",
    "I'm we'LL don't 'S '\u017f \u2019s O'Re",
    "1 12 123 1234567890 \u0661\u0662\u0663\u0664 \u00b2\u00bd \uff11\uff12 \U0001d7d8",
    "e\u0301 \u00e9 \u1e69 s\u0323\u0307 \ufb01 \u212b \u0130i \u00df \u1100\u1161\u11a8 \u0e01\u0e33 \u0928\u093f",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1f9\U0001f1fc \u2764\ufe0f \ufffd \x00\x07\x1b\x7f \ufeff",
    "\u4e2d\u6587\uff0c\u3001\u300c\u5f15\u865f\u300d\u3002\u6f22\u5b57123abc \U00020bb7\U0002a6d6",
    "<s></s><unk><pad> <s> </s> [INST] <|endoftext|> <|im_start|> \u2581a\u2581 \u0120b",
]


class Unusable(Exception):
    """A tokenizer that can't be used; says why."""


@dataclass
class Reference:
    """What Hugging Face says of a tokenizer, in numbers and text that outlive its process."""

    name: str
    json: str | None  # as in tokenizer.json; None if it exists in Python only
    split_special_tokens: bool  # special tokens in the text are text
    before: list  # ids that the tokenizer puts before every text; empty without --add_bos
    after: list
    eod: int | None
    size: int  # entries, added tokens included
    fingerprint: str | None  # None: fingerprint() of `json`, not computed yet
    versions: dict
    lost_by_nemo: list = field(default_factory=list)  # texts for which NeMo's script would write other ids


def fingerprint(tokenizer_json):
    """sha256 of what decides which id means what: vocabulary, merges and added tokens of a tokenizer.json, parsed."""
    model = tokenizer_json["model"]
    vocabulary = model["vocab"]  # token -> id, or a list of (token, score)
    entries = vocabulary.items() if isinstance(vocabulary, dict) else enumerate(map(tuple, vocabulary))
    added = [(token["content"], token["id"]) for token in tokenizer_json.get("added_tokens", [])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
    lines = [*sorted(map(repr, {*entries, *added})), *merges]
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogatepass")).hexdigest()


def folder_fingerprint(folder):
    """fingerprint() of the tokenizer in a folder, or None if it has no tokenizer.json."""
    try:
        parts = json.loads((Path(folder) / "tokenizer.json").read_bytes())
        config = Path(folder) / "tokenizer_config.json"
        if config.is_file():  # transformers adds these to the others
            tokens = json.loads(config.read_bytes()).get("added_tokens_decoder", {})
            added = [{"content": token["content"], "id": int(number)} for number, token in tokens.items()]
            parts["added_tokens"] = [*parts.get("added_tokens", []), *added]
        return fingerprint(parts)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def hugging_face(name):
    """transformers' tokenizer, set up as NeMo's AutoTokenizer does. Raises Unusable."""
    os.environ["USE_TORCH"] = "0"  # transformers would import it, for nothing here
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # the Hub's and the formats' errors are many
        raise Unusable(f"--tokenizer_type {name} can't be loaded: {error}") from None
    # NeMo lets these stand for one another, and so marks them as special: they are found in the text differently then.
    tokens = {"additional_special_tokens": []}
    for one, other in (("sep_token", "eos_token"), ("cls_token", "bos_token")):
        if getattr(tokenizer, one) is None and getattr(tokenizer, other):
            tokens[one] = getattr(tokenizer, other)
        elif getattr(tokenizer, other) is None and getattr(tokenizer, one):
            tokens[other] = getattr(tokenizer, one)
    tokenizer.add_special_tokens(tokens)
    return tokenizer


def reference(name, add_bos, texts):
    """(Reference, texts: `texts`, AWKWARD and some with the added tokens, the ids of each)."""
    from importlib import metadata

    tokenizer = hugging_face(name)
    backend, before, after = None, [], []
    if tokenizer.is_fast:
        tokenizer.backend_tokenizer.no_truncation()  # neither script cuts or fills a text
        tokenizer.backend_tokenizer.no_padding()
        backend = tokenizer.backend_tokenizer.to_str()
    if add_bos:
        plain, full = python_ids(tokenizer, "a", False), python_ids(tokenizer, "a", True)
        at = next((i for i in range(len(full)) if full[i : i + len(plain)] == plain), None)
        if at is None:
            raise Unusable(f"--add_bos: {name} does more to a text than to put tokens around it")
        before, after = full[:at], full[at + len(plain) :]
    found = Reference(
        name,
        backend,
        bool(getattr(tokenizer, "split_special_tokens", False)),
        before,
        after,
        tokenizer.eos_token_id,
        len(tokenizer),
        None if backend else fingerprint({"model": {"vocab": tokenizer.get_vocab()}}),
        {package: metadata.version(package) for package in ("transformers", "tokenizers")},
    )
    added = [token for token in tokenizer.get_added_vocab()]
    texts = [*texts, *AWKWARD, *(f"a {token} b{token}{token}c\n{token}" for token in added[:300])]
    expected = [python_ids(tokenizer, text, add_bos) for text in texts]
    if tokenizer.is_fast:
        # NeMo looks the tokens' text up again, and so loses added tokens that take in the spaces beside them.
        ids = [encoding.ids for encoding in tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=add_bos)]
        found.lost_by_nemo = [text for text, own, nemo in zip(texts, ids, expected) if own != nemo]
        expected = ids
    return found, texts, expected


def python_ids(tokenizer, text, add_bos):
    """Ids of a text as NeMo's script takes them, and with `add_bos` as Megatron-LM's."""
    if add_bos:
        return tokenizer(text).input_ids
    return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(text))


def load(library, found):
    """A function from texts to (ids of all of them, one after another; number of ids of each), without special tokens.

    Raises ImportError if there is no such library here, and whatever it raises about a tokenizer that it can't read.
    """
    import numpy

    if library == "fastokens":
        import fastokens

        fast, slow = fastokens.Tokenizer.from_json_str(found.json), []

        def encode(texts):
            try:
                ids, offsets = fast.encode_batch_flat(texts, split_special_tokens=found.split_special_tokens)
            except Exception:  # a limit of its regular expressions: nothing that Hugging Face's would stop at
                slow.append(slow[0] if slow else load("tokenizers", found))
                return slow[0](texts)
            return numpy.frombuffer(ids, numpy.uint32), numpy.diff(numpy.frombuffer(offsets, numpy.uint64).astype(int))

        return encode
    if library == "tokenizers":
        import tokenizers

        backend = tokenizers.Tokenizer.from_str(found.json)
        backend.encode_special_tokens = found.split_special_tokens
        batch = getattr(backend, "encode_batch_fast", backend.encode_batch)  # older ones have no faster

        def ids_of(texts):
            return [encoding.ids for encoding in batch(texts, add_special_tokens=False)]
    else:
        tokenizer = hugging_face(found.name)

        def ids_of(texts):
            return [python_ids(tokenizer, text, False) for text in texts]

    def encode(texts):
        ids = ids_of(texts)
        lengths = numpy.array([len(part) for part in ids], dtype=int)
        return numpy.fromiter(itertools.chain.from_iterable(ids), numpy.uint32, lengths.sum()), lengths

    return encode


def assemble(ids, lengths, found, append_eod):
    """Put the tokenizer's own tokens and the end of document around each text: (ids, lengths).

    As in the peers' scripts, a text of no tokens at all gets no end of document either.
    """
    import numpy

    before, after = found.before, found.after + ([found.eod] if append_eod else [])
    if not found.before and not found.after:
        full = lengths > 0
        if not full.all():
            some, lengths_ = assemble(ids, lengths[full], found, append_eod)
            lengths = lengths.copy()
            lengths[full] = lengths_
            return some, lengths
    if not before and not after:
        return ids, lengths
    longer = lengths + len(before) + len(after)
    out = numpy.empty(longer.sum(), numpy.uint32)
    body = numpy.ones(len(out), bool)
    ends = numpy.cumsum(longer)
    for offset, token in enumerate(before):
        out[ends - longer + offset] = token
        body[ends - longer + offset] = False
    for offset, token in enumerate(reversed(after), 1):
        out[ends - offset] = token
        body[ends - offset] = False
    out[body] = ids
    return out, longer
