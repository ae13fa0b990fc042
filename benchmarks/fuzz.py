"""100,000 mutated watermarks, commitments and timestamps: only the documented errors may come.

    python benchmarks/fuzz.py

The tests mutate a few thousand with hypothesis (tests/test_fuzz.py); this is plain, fast and prints counts.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import struct
import tempfile
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from activemark_fast import Key, Watermark
from activemark_fast.commitment import Commitment, CommitmentError
from activemark_fast.normalisation import Preprocess
from activemark_fast.site import Site, taps_after
from activemark_fast.watermark import WatermarkError

FIXTURES = Path(__file__).parent.parent / "tests" / "fixtures"
KEY = Key(bytes(range(7, 39)))  # of the fixtures
WORDS = [
    b"\0",
    b"\xff" * 8,
    b'"',
    b"{",
    b"}",
    b"[",
    b"]",
    b"\\",
    b"NaN",
    b"1e999",
    b"-1",
    b"null",
    b"99999999999",
]


def mutated(data: bytes, draw: random.Random) -> bytes:
    """`data` with one to four edits: bytes replaced, inserted, deleted or copied, or the rest cut off."""
    for _ in range(draw.randint(1, 4)):
        at, length = draw.randrange(len(data) + 1), draw.randint(0, 16)
        kind = draw.randrange(6)
        if kind == 0:
            data = data[:at] + bytes([draw.randrange(256)]) + data[at + 1 :]
        elif kind == 1:
            data = data[:at] + draw.choice(WORDS) + data[at + length :]
        elif kind == 2:
            data = data[:at] + draw.randbytes(length) + data[at:]
        elif kind == 3:
            data = data[:at] + data[at + length :]
        elif kind == 4:
            start = draw.randrange(len(data) + 1)
            data = data[:at] + data[start : start + length] + data[at + length :]
        elif draw.random() < 0.2:
            data = data[:at]
    return data


def resealed(data: bytes, draw: random.Random) -> bytes:
    """A watermark whose header text was mutated, with a checksum and lengths that fit."""
    length = int.from_bytes(data[:8], "little")
    outer = json.loads(data[8 : 8 + length])
    inner = json.loads(outer["__metadata__"]["activemark_watermark"]) | {"checksum": "0" * 64}
    text = mutated(json.dumps(inner, sort_keys=True).encode(), draw).decode("utf-8", "surrogateescape")
    outer["__metadata__"]["activemark_watermark"] = text
    header = json.dumps(outer).encode()
    unsealed = struct.pack("<Q", len(header)) + header + data[8 + length :]
    entry = r"\"checksum\": \"{}\""
    digest = hashlib.sha256(unsealed).hexdigest()
    return unsealed.replace(entry.format("0" * 64).encode(), entry.format(digest).encode(), 1)


def sealed() -> Watermark:
    """As `embed` leaves one for a model of 6 blocks."""
    return Watermark.seal(
        KEY,
        codec="keyed",
        bits=32,
        axis="token",
        site=Site(block=2, taps=taps_after(2, 6), num_tokens=17, prefix_tokens=1, width=96, depth=6),
        preprocess=Preprocess((32, 32), (0.5,) * 3, (0.5,) * 3),
        digests=(),
        image_source="key",
        state={},
        fingerprint="0" * 64,
        architecture="timm:vit_tiny_patch16_224",
        alignment=torch.zeros(16, 96, dtype=torch.float16),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mutations", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    old, commitment, response = (
        (FIXTURES / name).read_bytes()
        for name in ("watermark_v1.safetensors", "commitment_v1.json", "commitment_v1.tsr")
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mutated"
        sealed().save(path)
        new = path.read_bytes()

        def open_watermark() -> None:
            Watermark.load(path).check(KEY)

        def open_response() -> None:
            Commitment.load(FIXTURES / "commitment_v1.json", path, FIXTURES / "authority.pem")

        kinds: list[tuple[str, Callable[[], bytes], Callable[[], object]]] = [
            *(
                (f"watermark of format {version}, {how}", partial(mutate, data, draw), open_watermark)
                for version, data in ((1, old), (3, new))
                for how, mutate in (("bytes", mutated), ("header with a fitting checksum", resealed))
            ),
            ("commitment", lambda: mutated(commitment, draw), lambda: Commitment.load(path)),
            ("timestamp", lambda: mutated(response, draw), open_response),
        ]
        for name, mutate, read in kinds:
            counts: Counter[str] = Counter()
            for _ in range(arguments.mutations // len(kinds)):
                data = mutate()
                if data in (old, new, commitment, response):
                    counts["unchanged"] += 1
                    continue
                path.write_bytes(data)
                try:
                    read()
                except (WatermarkError, CommitmentError) as error:
                    counts[type(error).__name__] += 1
                else:
                    counts["read"] += 1  # nothing that counts was changed
            print(f"{name}: {dict(counts)}", flush=True)


if __name__ == "__main__":
    main()
