"""Values and files that commands have to refuse, or to ignore rightly; survive.py tries them."""

import dataclasses
import itertools
import json
import struct
import types
import typing
import zlib

from dit.config import Config, Range

# Values of a command line

INTEGERS = [-1, 0, 1, 255, 256, 10**7, 10**7 + 1, 2**32 - 1, 2**32]
FLOATS = [-1.0, -1e-9, 0.0, 1e-9, 0.5, 1 - 1e-9, 1.0, 1.1]
NONE_OF = {
    str: ["", "x", "a\0b"],
    int: ["", "x", "1.5", "nan", "1" + "0" * 400],
    float: ["", "x", "nan", "inf", "-inf", "1e39"],
}


def bad_flags() -> list[tuple[str, str]]:
    """Options of train.py and a value for each: at its bounds, beyond, and none of its type's."""
    cases = [("--name", value) for value in NONE_OF[str]]
    for section in dataclasses.fields(Config)[1:]:
        hints = typing.get_type_hints(section.default_factory, include_extras=True)
        for name, hint in hints.items():
            flag = f"--{section.name}.{name}".replace("_", "-")
            cases += [(flag, value) for value in bad_values(hint)]
    return cases


def bad_values(hint: typing.Any) -> list[str]:
    parts = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):  # every one is `X | None`
        return bad_values(parts[0])
    if typing.get_origin(hint) is typing.Annotated:
        ranges = [part for part in parts[1:] if isinstance(part, Range)]
        return bad_values(parts[0]) + [str(v) for r in ranges for v in bounds(parts[0], r)]
    return NONE_OF.get(hint, ["", "x"])  # of a bool or a choice


def bounds(kind: type, allowed: Range) -> list:
    """The two numbers on either side of each bound of a range."""
    numbers = {int: INTEGERS, float: FLOATS}.get(kind, [])
    pairs = itertools.pairwise(numbers)
    return [n for pair in pairs if len({allowed.contains(n) for n in pair}) == 2 for n in pair]


# Files of a run, whose newest checkpoint's folder is NEWEST

DEEP = b"[" * 100_000

# A file of a run, and what it holds, what is replaced in it by what, or None where it is removed.
# The checksums then fit, but where they are what is changed.
CHANGES = [
    ("NEWEST/checksums.json", b"{}"),
    ("NEWEST/checksums.json", DEEP),
    ("NEWEST/_CHECKPOINT_METADATA", b"[]"),
    ("NEWEST/_CHECKPOINT_METADATA", None),
    ("NEWEST/commit_success.txt", None),
    ("NEWEST/notes.txt", b"x"),
    ("NEWEST/ema/notes.txt", b"x"),
    ("NEWEST/ema/_METADATA", b"{}"),
    ("NEWEST/model/manifest.ocdbt", b""),
    ("NEWEST/optimizer/_sharding", b"\xff"),
    ("NEWEST/optimizer", None),
    ("NEWEST/config/metadata", DEEP),
    ("NEWEST/config/metadata", b"null"),
    ("NEWEST/config/metadata", (b'"depth": 2', b'"depth": 1000000000')),
    ("NEWEST/config/metadata", (b'"depth"', b'"breadth"')),
    ("NEWEST/dataset/metadata", b"{}"),
    ("NEWEST/dataset/metadata", (b'"0", ', b"")),
    ("NEWEST/dataset/metadata", (b"1797", b"-1")),
    ("NEWEST/log/metadata", b'{"steps": -1, "loss": 3.0}'),
    ("NEWEST/log/metadata", b'{"steps": 1, "loss": NaN}'),
    ("NEWEST", None),
    ("checkpoints/0021/notes.txt", b"x"),
    ("checkpoints/50/checksums.json", b"{}"),
    (f"checkpoints/{10**30}/checksums.json", DEEP),
    ("checkpoints/50", b"x"),
    ("checkpoints", None),
    ("samples", None),
    ("config.json", b"\xff"),
    ("metrics.jsonl", None),
    ("metrics.jsonl", b'{"step": 1}\n{"step": NaN, "loss": 3}\n[]\n' + DEEP),
    ("loss.png", b"x"),
    (".lock", b"process 1 on nowhere"),
]


# Files from elsewhere


def png(width: int, height: int) -> bytes:
    """A picture that claims to be so large, and is empty."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = [b"IHDR" + header, b"IDAT" + zlib.compress(b""), b"IEND"]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
        for chunk in chunks
    )


def safetensors(name: str) -> bytes:
    """One number under a name."""
    header = {name: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(4)


CONVERT = ["convert", "FILE", "out", "--num-heads", "4"]
STYLE = ["sample", "RUN", "--style", "FILE", "--out", "out.png"]
FID = ["fid", "FILE", "--reference", "x.npz", "--inception", "x.pth"]

# What is wrong, the file's name, what it holds, and the command that is given FILE, or RUN's folder
OFFERS = [
    ("a preset that raises", "x.py", b"1 / 0", ["train", "FILE"]),
    ("a preset of no config", "x.py", b"config = 3", ["train", "FILE"]),
    ("a preset that is no Python", "x.py", b"\xff(", ["train", "FILE"]),
    ("a preset of nested brackets", "x.py", DEEP, ["train", "FILE"]),
    ("weights of 99,999 blocks", "x.safetensors", safetensors("blocks.99999.x"), CONVERT),
    ("weights with an endless header", "x.safetensors", b"\xff" * 8, CONVERT),
    ("weights that are none", "x.pt", b"\x80\x04x", CONVERT),
    ("a picture of 144 megapixels", "x.png", png(12_000, 12_000), STYLE),
    ("a picture without its pixels", "x.png", png(8, 8), STYLE),
    ("half of a picture", "x.png", png(8, 8)[:40], STYLE),
    ("an empty picture", "x.png", b"", STYLE),
    ("a mask for a model without masks", "x.png", png(8, 8), [*STYLE[:2], "--mask", *STYLE[3:]]),
    ("samples that are none", "x.npz", b"PK\x03\x04", FID),
]
