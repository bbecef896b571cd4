"""A dataset that is being written, in a folder beside it: piece after piece, so that a killed run can go on.

PREFIX.partial/ holds, for each field, the tokens (.bin), the documents' lengths (.lengths, int32) and the hashes of
their texts (.hashes, uint64), and journal.jsonl: what the run is, then a line a piece. A line is written after its
piece. At the end the files are completed there, and renamed; a run that is killed while it renames goes on with that.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path

SUFFIXES = (".idx", ".bin", ".json", ".png")  # of one dataset


class Busy(Exception):
    """Another process writes this dataset."""


def final(prefix, key):
    """Megatron's name for the files of one field, without .bin or .idx."""
    return f"{prefix}_{key}_document"


def folder_of(prefix):
    return Path(f"{prefix}.partial")


def interrupted_publishing(prefix):
    """Whether a run was killed while it renamed its finished files."""
    return (folder_of(prefix) / "publish.json").is_file()


class Writer:
    """Writes the datasets PREFIX_KEY_document, one for each of `keys`; tokens have `token_bytes` bytes.

    Up to `ahead` pieces may be made before the first of them is appended.
    """

    def __init__(self, prefix, keys, token_bytes, ahead):
        self.prefix, self.keys, self.token_bytes, self.ahead = str(prefix), keys, token_bytes, ahead
        self.folder = folder_of(prefix)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "wb")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise Busy(f"another process is writing {prefix}; wait for it, or choose another --output_prefix") from None
        self.pieces = []  # the journal's lines
        self.files = {}

    def resume(self, identity):
        """Take over the pieces that an earlier run with the same `identity` finished, as far as they are whole.

        Returns how many there are, and whether something else lay here, which is removed.
        """
        for path in self.folder.iterdir():
            if path.name.startswith(("in-", "out-")):
                path.unlink()
        try:
            lines = (self.folder / "journal.jsonl").read_bytes().split(b"\n")[:-1]
        except OSError:
            lines = []
        known = bool(lines) and lines[0] == _line(identity)
        if known:
            self.pieces = self._whole(_parsed(lines[1:]))
        else:
            (self.folder / "journal.jsonl").write_bytes(_line(identity) + b"\n")
        for key in self.keys:
            for kind in ("bin", "lengths", "hashes"):
                self.files[key, kind] = open(self.path(key, kind), "ab")
        self.journal = open(self.folder / "journal.jsonl", "ab")
        self.keep(len(self.pieces))
        return len(self.pieces), bool(lines) and not known

    def path(self, key, kind):
        return self.folder / f"{key.replace('/', '_')}.{kind}"

    def _whole(self, lines):
        """The first of the journal's lines whose tokens lie on disk unchanged."""
        import xxhash

        try:
            opened = {key: open(self.path(key, "bin"), "rb") for key in self.keys}
            left = {
                (key, kind): self.path(key, kind).stat().st_size for key in self.keys for kind in ("lengths", "hashes")
            }
        except OSError:
            return []
        for number, line in enumerate(lines):
            for key, file in opened.items():
                written = line["keys"][key]
                for kind in ("lengths", "hashes"):
                    left[key, kind] -= written[kind]
                data = file.read(written["bin"])
                if xxhash.xxh3_64_hexdigest(data) != written["digest"] or min(left.values()) < 0:
                    return lines[:number]
        return lines

    def keep(self, count):
        """Forget all pieces but the first `count`."""
        self.pieces = self.pieces[:count]
        for (key, kind), file in self.files.items():
            file.truncate(sum(line["keys"][key][kind] for line in self.pieces))
        with open(self.folder / "journal.jsonl", "rb") as file:
            end = sum(len(file.readline()) for _ in range(count + 1))
        self.journal.truncate(end)

    def spool(self, number, index):
        """Where the tokens of piece `number` and field `index` wait: over those of a piece that has been appended."""
        return self.folder / f"out-{number % self.ahead}-{index}"

    def append(self, line):
        """Add a piece: `line` is what the journal says of it; its tokens lie in the spool's files."""
        for index, key in enumerate(self.keys):
            with open(self.spool(line["number"], index), "rb") as file:
                for kind in ("bin", "lengths", "hashes"):
                    self.files[key, kind].write(file.read(line["keys"][key][kind]))
        for file in self.files.values():
            file.flush()
        self.journal.write(_line(line) + b"\n")
        self.journal.flush()
        self.pieces.append(line)

    def size(self):
        """Bytes of the tokens that lie here."""
        return sum(file.stat().st_size for file in self.folder.glob("*.bin"))

    def finish(self, describe):
        """Complete the files and give them their names. `describe(key, path)` writes the .json and .png beside them."""
        from nemo_tutorial import megatron_data

        renames = []
        for key in self.keys:
            stem = str(self.path(key, "final"))
            megatron_data.write_index(stem + ".idx", self.path(key, "lengths"), self.token_bytes)
            describe(key, stem)
            for suffix in SUFFIXES:
                source = self.path(key, "bin") if suffix == ".bin" else Path(stem + suffix)
                if source.exists():
                    with open(source, "rb") as file:
                        os.fsync(file.fileno())
                    renames.append([str(source), final(self.prefix, key) + suffix])
        plan = self.folder / "publish.json"
        plan.with_suffix(".new").write_text(json.dumps(renames))
        plan.with_suffix(".new").rename(plan)
        publish(self.prefix)


def publish(prefix):
    """Rename the finished files, as publish.json in the folder says; again, if that was interrupted."""
    folder = folder_of(prefix)
    renames = json.loads((folder / "publish.json").read_text())
    for source, target in renames:
        # An index of an older dataset first: a .bin without its .idx is never taken for a dataset.
        if target.endswith(".idx") and os.path.exists(source):
            Path(target).unlink(missing_ok=True)
    for source, target in sorted(renames, key=lambda pair: pair[0].endswith(".idx")):
        if os.path.exists(source):
            os.replace(source, target)
    shutil.rmtree(folder)


def _parsed(lines):
    """The journal's lines, up to one that a crash of the machine may have left half-written."""
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            break
    return found


def _line(value):
    return json.dumps(value, sort_keys=True).encode()
