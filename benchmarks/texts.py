"""Text to measure with, made from what this machine and Debian's packages hold, and a tokenizer trained on it.

    python benchmarks/texts.py FOLDER

writes FOLDER/english.jsonl (200 MB: documentation and Python sources of this machine, no file twice),
FOLDER/chinese.jsonl (100 MB of Traditional Chinese) and FOLDER/tokenizer (a byte-level BPE of 128,000 entries, trained
on 40 MB of both, Llama 3's pattern). What exists is kept.
"""

import gzip
import hashlib
import html
import json
import random
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "data"))

SEED = 1234
ENGLISH, CHINESE, TRAINED_ON = 200_000_000, 100_000_000, 40_000_000
VOCABULARY = 128_000
DOCUMENTATION = ("/usr/share/doc", "/usr/share/man/man*", "/usr/share/info", "/usr/share/perl")
SOURCES = (sysconfig.get_path("purelib"), sysconfig.get_path("stdlib"), "/usr/lib/python3*")
# opencc turns Simplified characters and words into Taiwan's; what is Traditional already stays as it is.
PACKAGES = (
    "debian-reference-zh-tw maint-guide-zh-tw manpages-zh libreoffice-help-zh-tw firefox-esr-l10n-zh-tw "
    "thunderbird-l10n-zh-tw debian-edu-doc-zh-cn kicad-doc-zh gimp-help-zh-cn"
).split()
OPENCC = "opencc libopencc1.1 libopencc-data libmarisa0".split()


def read(path):
    """A file's text without HTML's tags, or "" if it isn't UTF-8 text."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        text = data.decode("utf-8")
    except (OSError, ValueError, EOFError):
        return ""
    if "\0" in text:
        return ""
    if path.suffix == ".html":
        text = html.unescape(re.sub(r"(?s)<(script|style).*?</\1>|<[^>]*>", "", text))
    return re.sub(r"\n\s*\n+", "\n\n", text)


def files(patterns, suffixes):
    """Files of the folders, in an order that depends on nothing but their content's names."""
    found = set()
    for pattern in patterns:
        for folder in Path("/").glob(pattern.lstrip("/")):
            found.update(path for path in folder.rglob("*") if path.suffix in suffixes and path.is_file())
    return sorted(found, key=lambda path: hashlib.sha256(str(path).encode()).digest())


def distinct(paths, size):
    """Texts of the files, no text twice, until their UTF-8 has `size` bytes."""
    seen, taken = set(), 0
    for path in paths:
        text = read(path)
        digest = hashlib.sha256(text.encode()).digest()
        if len(text) < 200 or len(text) > 2_000_000 or digest in seen:
            continue
        seen.add(digest)
        taken += len(text.encode())
        yield text
        if taken >= size:
            return
    sys.exit(f"error: this machine has only {taken / 1e6:.0f} MB of such files, {size / 1e6:.0f} MB are needed")


def english():
    """Documents: half documentation, half Python sources, shuffled."""
    documentation = distinct(files(DOCUMENTATION, {".gz", ".html", ".md", ".txt", ".rst"}), ENGLISH // 2)
    sources = distinct(files(SOURCES, {".py"}), ENGLISH // 2)
    documents = [*documentation, *sources]
    random.Random(SEED).shuffle(documents)
    return documents


def chinese_texts(folder):
    """Traditional Chinese paragraphs of Debian's packages, no paragraph twice, as one string a package."""
    download = ["apt-get", "download", "-qq", *PACKAGES, *OPENCC]
    subprocess.run(download, cwd=folder, check=True, stderr=subprocess.DEVNULL)
    for file in folder.glob("*.deb"):
        package = file.name.split("_")[0]
        target = "opencc" if package in OPENCC else package
        subprocess.run(["dpkg-deb", "-x", file.name, target], cwd=folder, check=True)
    for archive in folder.rglob("*.xpi"):
        subprocess.run(["unzip", "-qo", archive.name], cwd=archive.parent, check=True)
    tools = folder / "opencc" / "usr"
    libraries = {"LD_LIBRARY_PATH": str(next(tools.glob("lib/*-linux-gnu")))}
    seen = set()
    for package in PACKAGES:
        kept = []
        for path in sorted((folder / package).rglob("*")):
            if path.suffix in {".html", ".txt", ".gz", ".ftl", ".properties"} and path.is_file():
                for paragraph in read(path).split("\n\n"):
                    characters = len(re.findall(r"[\u4e00-\u9fff]", paragraph))
                    if characters >= 8 and characters > len(paragraph) / 5 and paragraph not in seen:
                        seen.add(paragraph)
                        kept.append(paragraph.strip())
        command = [tools / "bin" / "opencc", "-c", "s2twp.json"]
        text, data = "\n".join(kept).encode(), tools / "share" / "opencc"
        done = subprocess.run(command, input=text, cwd=data, env=libraries, capture_output=True, check=True)
        yield done.stdout.decode()


def chinese():
    """Documents of 300 to 6000 characters: every text once, then spans that begin and end at random characters."""
    with tempfile.TemporaryDirectory() as folder:
        texts = [text for text in chinese_texts(Path(folder)) if text]
    generator, documents, taken = random.Random(SEED), [], 0
    original = "\n".join(texts)
    print(f"Traditional Chinese: {len(original.encode()) / 1e6:.1f} MB before it is spliced", file=sys.stderr)
    start = 0
    while taken < CHINESE:
        length = generator.randint(300, 6000)
        if start < len(original):
            document = original[start : start + length]
            start += length
        else:
            # Several short spans, cut anywhere: a tokenizer that remembers what it has seen gains little from them.
            document = ""
            while len(document) < length:
                at = generator.randrange(len(original))
                document += original[at : at + generator.randint(5, 60)]
        documents.append(document)
        taken += len(document.encode())
    generator.shuffle(documents)
    return documents


def train(paths, folder):
    """A byte-level BPE with Llama 3's pattern, trained on an equal share of each file."""
    from make_tiny_model import SPECIAL, WORDS
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    def texts():
        for path in paths:
            taken = 0
            with open(path, encoding="utf-8") as lines:
                for line in lines:
                    yield json.loads(line)["text"]
                    taken += len(line.encode())
                    if taken > TRAINED_ON / len(paths):
                        break

    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(WORDS), behavior="isolated")
    bytes_ = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, bytes_])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY - len(SPECIAL), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    tokenizer.add_special_tokens(SPECIAL)
    bos = "<|begin_of_text|>"
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=bos, eos_token="<|eot_id|>", clean_up_tokenization_spaces=False
    ).save_pretrained(folder)


def make(folder):
    """Make what is missing in `folder`: (English JSONL, Chinese JSONL, tokenizer folder)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, documents in (("english", english), ("chinese", chinese)):
        path = folder / f"{name}.jsonl"
        paths.append(path)
        if not path.exists():
            partial = path.with_suffix(".partial")
            with open(partial, "w", encoding="utf-8") as file:
                for text in documents():
                    file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            partial.rename(path)
    if not (folder / "tokenizer" / "tokenizer_config.json").exists():
        train(paths, folder / "tokenizer")
    return *paths, folder / "tokenizer"


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    make(Path(sys.argv[1]))
