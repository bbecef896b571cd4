"""Pickles read without unpickling: what one names and what it holds. Nothing is imported, built or called.

A small machine follows the opcodes as Python's does, with names, calls and objects as values of its own. It knows the
opcodes that pickle, cloudpickle and torch write (protocols 2 to 5), and refuses all others.
"""

import io
import re
import struct

TORCH_MAGIC = 0x1950A86A20F9469CFC6C  # torch.save's format before its zips: five pickles, and the tensors' bytes
# What torch.save puts into a zip, under one folder. Another data.pkl, or TorchScript's code, is none of it.
MEMBERS = re.compile(
    r"data\.pkl|byteorder|version|\.format_version|\.storage_alignment|\.data/serialization_id|data/\d+"
)
DEEPEST = 8  # pickles within pickles


class Unreadable(Exception):
    """The sentence says why a pickle can't be followed to its end."""


class Named(tuple):
    """A name that a pickle imports: (module, name)."""

    __slots__ = ()

    def __str__(self):
        return ".".join(self)


class Reading(Named):
    """A name whose call is looked into: it gives bytes, or reads them."""

    __slots__ = ()


READING = (
    ("_codecs", "encode"),
    ("_io", "BytesIO"),
    ("torch.storage", "_load_from_bytes"),
    ("torch._utils", "_rebuild_tensor_v2"),
)
# All that torch writes of bytes in a BytesIO or in a tensor.
BYTES = {
    ("_codecs", "encode"),
    ("_io", "BytesIO"),
    ("collections", "OrderedDict"),
    ("torch", "ByteStorage"),
    ("torch._utils", "_rebuild_tensor_v2"),
}


class Made:
    """An object that a pickle makes: of what, with which arguments, and what is set of it then, the last last."""

    __slots__ = ("of", "args", "state")

    def __init__(self, of, args):
        self.of, self.args, self.state = of, args, []

    def fields(self, *names):
        """Attributes of an object that is made without arguments, None where not set. Raises Unreadable."""
        if self.args:
            raise Unreadable(f"makes a {self.of} in another way than torch does")
        state = dict(pair for pair in self.state if isinstance(pair[0], str))
        return [state.get(name) for name in names]


class Pairs(list):
    """A dict: its keys need not be hashable here."""


class Scan:
    """What the pickles of a file name: `names` in the order met, and `problems`, sentences about anything else.

    Bytes within a pickle are followed too if they begin as one; with `everything`, those of the outermost (which can
    be a tensor's) whatever they begin with.
    """

    def __init__(self, everything=False):
        self.names, self.problems, self.everything = {}, {}, everything

    def problem(self, sentence):
        self.problems[sentence] = None

    def file(self, data, strict=True, depth=0):
        """Follow all pickles of a file's bytes, whatever its format; return the (first) value.

        Raises Unreadable; if not `strict`, bytes that are no pickle are nothing.
        """
        if depth > DEEPEST:
            raise Unreadable("holds pickles within pickles without an end")
        try:
            if bytes(data[:4]) == b"PK\x03\x04":
                return self._zip(data, depth)
            value, end = self._pickle(data, 0, depth)
            if value == TORCH_MAGIC and end < len(data):
                return self._legacy(data, end, depth)
            return value
        except Unreadable:
            if strict:
                raise
        except (LookupError, ValueError, TypeError, AttributeError, struct.error, MemoryError) as error:
            if strict:
                raise Unreadable(f"is no whole pickle ({error!r})") from None

    def _legacy(self, data, end, depth):
        """torch.save's old format, after its magic number: protocol, system, object, names of the tensors."""
        import tarfile

        if tarfile.is_tarfile(io.BytesIO(data)):
            raise Unreadable("is a tar archive and a pickle at once")
        for number in range(4):
            value, end = self._pickle(data, end, depth)
            if number == 2:
                found = value
        return found

    def _zip(self, data, depth):
        """torch.save's zip. Two readers must not see two things in it: entries lie one after the other, each once."""
        import zipfile

        try:
            with zipfile.ZipFile(io.BytesIO(data)) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.header_offset)
                at, folder = 0, entries[0].filename.split("/")[0] if entries else ""
                for entry, following in zip(entries, [*(e.header_offset for e in entries[1:]), archive.start_dir]):
                    name = entry.filename.removeprefix(folder + "/")
                    if not MEMBERS.fullmatch(name):
                        raise Unreadable(f"holds {entry.filename}, which torch.save does not write")
                    header = data[at : at + 30]
                    names = sum(struct.unpack("<HH", header[26:30]))
                    rest = following - at - 30 - names - entry.compress_size
                    plain = not entry.compress_type and not entry.flag_bits & 1
                    if not plain or entry.header_offset != at or rest not in (0, 16, 24):  # 16, 24: sizes once more
                        raise Unreadable("is no zip as torch.save writes it")
                    at = following
                if len({entry.filename.lower() for entry in entries}) != len(entries) or archive.comment:
                    raise Unreadable("holds a file twice, or a comment")
                value = None
                for entry in entries:
                    name = entry.filename.removeprefix(folder + "/")
                    if name == "data.pkl":
                        value, _ = self._pickle(archive.read(entry), 0, depth)
                    elif name == "byteorder" and archive.read(entry) != b"little":
                        raise Unreadable("has tensors whose bytes are swapped when they are read")
                    elif name.startswith("data/"):
                        self.nested(archive.read(entry), depth)
                return value
        except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
            raise Unreadable(f"is no whole zip ({error})") from None

    def nested(self, data, depth):
        """Bytes within a pickle, or a tensor's: a pickle themselves, it may be."""
        everything = self.everything and depth == 0
        if data and (everything or data[:1] == b"\x80" or data[:2] == b"PK"):
            self.file(bytes(data), strict=everything, depth=depth + 1)

    def _pickle(self, data, at, depth):
        """Follow the pickle that begins at `at`: (its value, where it ends)."""
        stack, marks, memo = [], [], {}
        frame = whole = len(data)
        while True:
            if at >= frame:
                # Python reads from a file by frames: an opcode across the end of one would be another for it.
                if at > frame:
                    raise Unreadable("has an opcode across the end of a frame")
                frame = whole
            op = data[at]
            at += 1
            # About in the order of how often they are met in a checkpoint's metadata.
            if op == 0x68:  # BINGET
                stack.append(memo[data[at]])
                at += 1
            elif op == 0x94:  # MEMOIZE
                memo[len(memo)] = stack[-1]
            elif op == 0x6A:  # LONG_BINGET
                stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                at += 4
            elif op == 0x4B:  # BININT1
                stack.append(data[at])
                at += 1
            elif op == 0x4D:  # BININT2
                stack.append(data[at] | data[at + 1] << 8)
                at += 2
            elif op == 0x4A:  # BININT
                stack.append(int.from_bytes(data[at : at + 4], "little", signed=True))
                at += 4
            elif op == 0x28:  # MARK
                marks.append(stack)
                stack = []
            elif op == 0x85:  # TUPLE1
                stack[-1] = (stack[-1],)
            elif op == 0x86:  # TUPLE2
                stack[-2:] = [tuple(stack[-2:])]
            elif op == 0x52 or op == 0x81:  # REDUCE, NEWOBJ
                args = stack.pop()
                what = stack[-1]
                stack[-1] = Made(what, args) if type(what) is Named else self._call(what, args, depth)
            elif op == 0x62:  # BUILD
                state = stack.pop()
                self._build(stack[-1], state, depth)
            elif op == 0x8C:  # SHORT_BINUNICODE
                end = at + 1 + data[at]
                stack.append(str(data[at + 1 : end], "utf-8", "surrogatepass"))
                at = end
            elif op == 0x7D:  # EMPTY_DICT
                stack.append(Pairs())
            elif op == 0x75:  # SETITEMS
                items, stack = stack, marks.pop()
                _extend(stack[-1], list(zip(items[::2], items[1::2])))
            elif op == 0x4E:  # NONE
                stack.append(None)
            elif op == 0x71:  # BINPUT
                memo[data[at]] = stack[-1]
                at += 1
            elif op == 0x72:  # LONG_BINPUT
                memo[int.from_bytes(data[at : at + 4], "little")] = stack[-1]
                at += 4
            elif op == 0x58:  # BINUNICODE
                at, content = _counted(data, at, 4)
                stack.append(str(content, "utf-8", "surrogatepass"))
            elif op == 0x87:  # TUPLE3
                stack[-3:] = [tuple(stack[-3:])]
            elif op == 0x29:  # EMPTY_TUPLE
                stack.append(())
            elif op == 0x74:  # TUPLE
                items, stack = stack, marks.pop()
                stack.append(tuple(items))
            elif op == 0x5D or op == 0x8F:  # EMPTY_LIST, EMPTY_SET
                stack.append([])
            elif op == 0x65 or op == 0x90:  # APPENDS, ADDITEMS
                items, stack = stack, marks.pop()
                _extend(stack[-1], items)
            elif op == 0x61:  # APPEND
                item = stack.pop()
                _extend(stack[-1], [item])
            elif op == 0x73:  # SETITEM
                item = tuple(stack[-2:])
                del stack[-2:]
                _extend(stack[-1], [item])
            elif op == 0x8A:  # LONG1
                end = at + 1 + data[at]
                stack.append(int.from_bytes(data[at + 1 : end], "little", signed=True))
                at = end
            elif op == 0x88 or op == 0x89:  # NEWTRUE, NEWFALSE
                stack.append(op == 0x88)
            elif op == 0x93:  # STACK_GLOBAL
                name, module = stack.pop(), stack.pop()
                if not isinstance(name, str) or not isinstance(module, str):
                    raise Unreadable("takes a name to import from what is no text")
                stack.append(self._name(depth, module, name))
            elif op == 0x63:  # GLOBAL
                at, module = _line(data, at)
                at, name = _line(data, at)
                stack.append(self._name(depth, module, name))
            elif op == 0x51:  # BINPERSID, a tensor's storage in torch's pickles: kept, as what is asked for
                stack[-1] = Made(None, stack[-1])
            elif op == 0x95:  # FRAME
                at, size = at + 8, int.from_bytes(data[at : at + 8], "little")
                if frame != whole or at + size > whole:
                    raise Unreadable("has a frame within a frame, or beyond its end")
                frame = at + size
            elif op == 0x80:  # PROTO
                if data[at] > 5:
                    raise Unreadable(f"is a pickle of protocol {data[at]}, which is not known here")
                at += 1
            elif op == 0x2E:  # STOP
                if at != frame != whole:
                    raise Unreadable("ends within a frame")
                return stack.pop(), at
            elif op == 0x47:  # BINFLOAT
                stack.append(struct.unpack(">d", data[at : at + 8])[0])
                at += 8
            elif op in (0x42, 0x43, 0x8E, 0x96):  # BINBYTES, SHORT_BINBYTES, BINBYTES8, BYTEARRAY8
                at, content = _counted(data, at, {0x42: 4, 0x43: 1}.get(op, 8))
                self.nested(content, depth)
                stack.append(content)
            elif op == 0x8D:  # BINUNICODE8
                at, content = _counted(data, at, 8)
                stack.append(str(content, "utf-8", "surrogatepass"))
            elif op == 0x8B:  # LONG4
                at, content = _counted(data, at, 4)
                stack.append(int.from_bytes(content, "little", signed=True))
            elif op == 0x91:  # FROZENSET
                items, stack = stack, marks.pop()
                stack.append(items)
            elif op == 0x92:  # NEWOBJ_EX
                keywords, args = stack.pop(), stack.pop()
                stack[-1] = self._call(stack[-1], (*args, keywords), depth)
            elif op == 0x30:  # POP
                if stack:
                    stack.pop()
                else:
                    stack = marks.pop()
            elif op == 0x31:  # POP_MARK
                stack = marks.pop()
            elif op == 0x32:  # DUP
                stack.append(stack[-1])
            else:
                import pickletools

                known = pickletools.code2op.get(chr(op))
                raise Unreadable(f"has the opcode {known.name if known else hex(op)}, which is not followed here")

    def _name(self, depth, *name):
        self.names[name] = None
        if self.everything and depth == 0 and name not in BYTES:
            self.problem(f"names {'.'.join(name)} where only bytes are expected")
        return Reading(name) if name in READING else Named(name)

    def _call(self, what, args, depth):
        """A call, of what is named outright: what another call has returned could be anything."""
        if not isinstance(what, Named):
            self.problem("calls what another call returns")
            return Made(None, args)
        if what == ("_codecs", "encode"):
            if not isinstance(args, tuple) or len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
                raise Unreadable("encodes text as torch does not")
            content = args[0].encode("latin1")  # how protocol 2 has bytes
            self.nested(content, depth)
            return content
        if what == ("torch.storage", "_load_from_bytes"):  # torch.load, of a tensor in a plain pickle
            if not isinstance(args, tuple) or len(args) != 1 or not isinstance(args[0], bytes):
                raise Unreadable("loads a tensor from what is no bytes")
            self.file(args[0], depth=depth + 1)
        if what == ("_io", "BytesIO") and self.everything and depth == 0 and args:
            raise Unreadable("has bytes that are put together when it is loaded")
        if what == ("torch._utils", "_rebuild_tensor_v2") and self.everything and depth == 0:
            storage, start, size, stride = args[:4]
            if start or stride != (1,) or size != (storage.args[4],):
                raise Unreadable("has a tensor of some of the bytes, which could be another pickle than all of them")
        return Made(what, args)

    def _build(self, made, state, depth):
        if not isinstance(made, Made):
            self.problem(f"changes {made}" if isinstance(made, Named) else "sets the state of what has none")
            return
        if self.everything and depth == 0 and made.of == ("_io", "BytesIO") and not isinstance(state[0], bytes):
            raise Unreadable("has bytes that are put together when it is loaded")
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, Pairs):
                for key, _ in part:
                    if isinstance(key, str) and key[:2] == "__":
                        self.problem(f"sets {key} of {made.of}")
                made.state += part


def _extend(target, items):
    """Append to a list or a dict. What an object such as an OrderedDict holds is not looked at."""
    if not isinstance(target, Made):
        target.extend(items)


def _counted(data, at, width):
    """Bytes with their length before them: (where they end, bytes)."""
    start = at + width
    end = start + int.from_bytes(data[at:start], "little")
    if end > len(data):
        raise Unreadable("ends too early")
    return end, bytes(data[start:end])


def _line(data, at):
    """Text up to the end of a line: (where the next begins, text)."""
    end = data.find(b"\n", at)
    if end < 0:
        raise Unreadable("ends too early")
    return end + 1, str(data[at:end], "utf-8")
