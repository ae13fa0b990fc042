"""Suspects whose residual stream or attention has another width than the marked model's, brought to that.

Whoever pads a residual stream, with zeros, with channels that are there twice, or with both and a rotation
over them, leaves what the blocks compute as it was: layer norms and linear layers see the stream only up to a
map that keeps lengths. The stream then lies in a subspace, which the weights that write to it span. It is
brought from there into a stream of the marked width by a map T that keeps lengths and the mean of channels
out: what writes to the stream, W, becomes s T W; what reads it, W diag(gamma) T' / s, the weight gamma and
the bias of the layer norm before it folded in. s, the root of the quotient of the widths, makes the norms see
the same variance. Of a stream that fills too large a space the directions that least is written to are lost.

All this follows from the suspect's weights alone, so the p-value of what is then read stays exact. Where T
turns the stream against the marked model's, the reading undoes it like any other rotation (`align`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from activemark_fast.checkpoints.names import PATCH, within
from activemark_fast.checkpoints.wanted import Group

_MAX_RATIO = 2
"""A stream may be up to so many times as wide as the marked one, or less than that as narrow; an attention,
up to so many times as wide."""
_READERS = {"norm1": ("attn.qkv", "attn.q", "attn.k", "attn.v"), "norm2": ("mlp.fc1", "mlp.gate", "mlp.up")}
"""What reads the stream, by the layer norm before it."""
_READS = tuple(reader for readers in _READERS.values() for reader in readers)
_WRITERS = {"attn.proj": "ls1", "mlp.fc2": "ls2"}
"""What writes to the stream, and the factors of its channels."""
_STEM = {PATCH: 0, "patch.bias": 0, "cls": -1, "pos": -1, "reg": -1}
_STEM_NORM = {"norm_pre.weight": 0, "norm_pre.bias": 0}
_WRITTEN = _STEM | {f"{writer}.{kind}": 0 for writer in _WRITERS for kind in ("weight", "bias")}
_STREAM = {
    **_WRITTEN,
    **_STEM_NORM,
    **{f"{norm}.{kind}": 0 for norm in _READERS for kind in ("weight", "bias")},
    **{f"{reader}.weight": 1 for reader in _READS},
    **dict.fromkeys(_WRITERS.values(), 0),
}
"""Along which axis a tensor has the channels of the stream."""
_ATTENTION = {f"{part}.{kind}": 0 for part in _READERS["norm1"] for kind in ("weight", "bias")}
_ATTENTION |= {"attn.proj.weight": 1}
"""Along which axis a tensor has the channels of the attention."""
_KNOWN = {*_STREAM, *(f"{reader}.bias" for reader in _READS)}


@dataclass(frozen=True, eq=False)
class Narrowing:
    """Makes the marked model's tensors of those of a suspect with other widths.

    Attributes:
        stem, blocks: the model's tensors, in the suspect's widths.
        told: what differs, in words.
        doubts: those of `told` that may hide a mark: fewer heads do not.
        width: of the stream, there and wanted.
        inner: wanted of the attention of each block that has another.
        heads: of the attention.
    """

    stem: Group
    blocks: list[Group]
    told: tuple[str, ...]
    doubts: tuple[str, ...]
    width: tuple[int, int]
    inner: dict[int, int]
    heads: int | None

    @classmethod
    def of(
        cls, stem: Group, blocks: list[Group], heads: int | None, width: int, inner: Mapping[int, int]
    ) -> Narrowing | None:
        """How a suspect is narrowed; None where its widths are the model's, or are no plain ViT's.

        Args:
            stem: the model's tensors before its blocks.
            blocks: and in them.
            heads: of its attention; None where that is not known.
            width: of the suspect's stream.
            inner: block → width of the suspect's attention.
        """
        wanted = stem[PATCH][1][0] if PATCH in stem else width
        near = wanted / _MAX_RATIO < width <= _MAX_RATIO * wanted
        if width != wanted and not (near and _is_plain(stem, blocks)):
            return None
        inners = [_shapes(block).get("attn.proj.weight", (0, 0))[-1] for block in blocks]
        parts = {"attn.q.weight", "attn.k.weight", "attn.v.weight"}
        other = {
            index: there
            for index, there in inner.items()
            if heads is not None
            and (
                inners[index] < there <= _MAX_RATIO * inners[index]
                or _whole_heads(there, inners[index], heads)
            )
            and ("attn.qkv.weight" in _shapes(blocks[index]) or parts <= _shapes(blocks[index]).keys())
        }
        doubts = [f"a residual stream of {width} channels, wanted {wanted}"] if width != wanted else []
        doubts += dict.fromkeys(
            f"an attention of {n} channels, wanted {inners[i]}" for i, n in other.items() if n > inners[i]
        )
        fewer = any(n < inners[i] for i, n in other.items())
        told = [*doubts, *(["fewer heads: those it lacks add nothing"] if fewer else [])]

        def there(group: Group, index: int | None = None) -> Group:
            """A group in the suspect's widths."""
            made = {}
            for common, (own, shape) in group.items():
                name = within(common)
                sizes = list(shape)
                if index in other and name in _ATTENTION:
                    axis = _ATTENTION[name]
                    sizes[axis] = sizes[axis] // inners[index] * other[index]
                if width != wanted and name in _STREAM:
                    sizes[_STREAM[name]] = width
                made[common] = (own, tuple(sizes))
            return made

        if not told:
            return None
        wide = [there(block, index) for index, block in enumerate(blocks)]
        return cls(
            there(stem),
            wide,
            tuple(told),
            tuple(doubts),
            (width, wanted),
            {index: inners[index] for index in other},
            heads,
        )

    def tensors(
        self, made: Mapping[str, Tensor], neutral: Mapping[str, float], depth: int
    ) -> Iterator[tuple[str, Tensor]]:
        """(own name, values) of the model's tensors, float32, of the stem and the first `depth` blocks.

        Args:
            made: own name → values, in the suspect's widths.
            neutral: own name → what a tensor is filled with that the suspect does not have.
            depth: how many blocks there are.
        """
        device = next(iter(made.values())).device
        groups = [self.stem, *self.blocks[:depth]]
        values = [
            {
                within(common): made[own].float()
                if own in made
                else torch.full(shape, neutral[own]).to(device)
                for common, (own, shape) in group.items()
            }
            for group in groups
        ]
        for index, inner in self.inner.items():
            if index < depth and self.heads is not None:
                _narrow_attention(values[1 + index], self.heads, inner)
        if self.width[0] != self.width[1]:
            _narrow_stream(values[0], values[1:], self.width[1])
        for group, narrow in zip(groups, values, strict=True):
            for common, (own, _) in group.items():
                yield own, narrow[within(common)]


def _shapes(block: Group) -> dict[str, tuple[int, ...]]:
    return {within(common): shape for common, (_, shape) in block.items()}


def _whole_heads(there: int, inner: int, heads: int) -> bool:
    """Whether an attention of `there` channels has some of `heads` heads that have `inner` together."""
    return 0 < there < inner and there % (inner // heads) == 0


def _is_plain(stem: Group, blocks: list[Group]) -> bool:
    """Whether a model has a stream that only layer norms read, into linear layers with a bias."""
    every = [_shapes(block).keys() for block in blocks]
    biased = all(
        f"{reader}.bias" in names for names in every for reader in _READS if f"{reader}.weight" in names
    )
    normed = all(f"{norm}.bias" in names for names in every for norm in _READERS)
    return (
        stem.keys() <= _STEM.keys() | _STEM_NORM.keys()
        and all(names <= _KNOWN for names in every)
        and biased
        and normed
    )


def _narrow_attention(block: dict[str, Tensor], heads: int, inner: int) -> None:
    """Leaves an attention `inner` channels: whole heads, or as many of each head, of those that add most.

    Heads that are there several times are first made one. Fewer heads get others that add nothing.
    """
    fused = "attn.qkv.weight" in block
    names = ("qkv",) if fused else ("q", "k", "v")
    parts: list[Tensor] = []  # of queries, keys and values: weight, and the bias as its last column
    for part in names:
        rows, bias = block[f"attn.{part}.weight"], block.get(f"attn.{part}.bias")
        rows = torch.cat([rows, rows.new_zeros(len(rows), 1) if bias is None else bias[:, None]], 1)
        parts += rows.chunk(3 if fused else 1)
    out = block["attn.proj.weight"]
    size, there = inner // heads, out.shape[1]
    if there < inner:
        parts = [nn.functional.pad(rows, (0, 0, 0, inner - there)) for rows in parts]
        out, there = nn.functional.pad(out, (0, inner - there)), inner
    ways: list[tuple[float, Tensor, Tensor, float, Tensor]] = []
    if there % size == 0:
        several = torch.cat(parts, 1).unflatten(0, (-1, size))
        merged = out.clone().unflatten(1, (-1, size))
        for one, head in enumerate(several):
            for other in range(one + 1, len(several)):
                if torch.equal(head, several[other]):
                    merged[:, one] += merged[:, other]
                    merged[:, other] = 0
        merged = merged.flatten(1)
        adds = (parts[2].norm(dim=1) * merged.norm(dim=0)).square().unflatten(0, (-1, size)).sum(1)
        kept = adds.topk(heads).indices.sort().values
        places = (size * kept[:, None] + torch.arange(size, device=kept.device)).flatten()
        ways.append((_lost(adds, kept), places, places, 1.0, merged))
    if there % heads == 0:
        longer = there // heads
        scores = [parts[0].norm(dim=1) * parts[1].norm(dim=1), parts[2].norm(dim=1) * out.norm(dim=0)]
        first = longer * torch.arange(heads, device=out.device)[:, None]
        seen, sent = (
            (first + score.unflatten(0, (heads, longer)).topk(size).indices.sort().values).flatten()
            for score in scores
        )
        lost = _lost(scores[0].square(), seen) + _lost(scores[1].square(), sent)
        scale = (size / longer) ** 0.5  # scores are divided by the root of a head's length
        ways.append((lost, seen, sent, scale, out))
    if not ways:
        ways.append((1.0, first := torch.arange(inner, device=out.device), first, 1.0, out))
    _, seen, sent, scale, out = min(ways, key=lambda way: way[0])
    block["attn.proj.weight"] = out[:, sent]
    parts = [scale * parts[0][seen], parts[1][seen], parts[2][sent]]
    for part, rows in zip(names, [torch.cat(parts)] if fused else parts, strict=True):
        block[f"attn.{part}.weight"] = rows[:, :-1]
        if f"attn.{part}.bias" in block:
            block[f"attn.{part}.bias"] = rows[:, -1]


def _lost(adds: Tensor, kept: Tensor) -> float:
    """The share that is lost of what channels or heads add."""
    return 1 - float(adds[kept].sum() / adds.sum().clamp_min(torch.finfo(adds.dtype).tiny))


def _narrow_stream(stem: dict[str, Tensor], blocks: list[dict[str, Tensor]], width: int) -> None:
    """Brings a residual stream to `width` channels."""
    for block in blocks:
        for writer, scale in _WRITERS.items():
            if scale in block:
                factors = block[scale]
                block[f"{writer}.weight"] = block[f"{writer}.weight"] * factors[:, None]
                if f"{writer}.bias" in block:
                    block[f"{writer}.bias"] = block[f"{writer}.bias"] * factors
                block[scale] = factors.new_ones(width)
    written = [
        (group, name, group[name].movedim(axis, 0))
        for group in (stem, *blocks)
        for name, axis in _WRITTEN.items()
        if name in group
    ]
    device = written[0][2].device
    spread = _spread([values.double().cpu() for _, name, values in written if not name.endswith(".bias")])
    normed = "norm_pre.weight" in stem  # its weights act channel by channel: what leaves it cannot be turned
    into, out = (part.float().to(device) for part in (_chosen if normed else _turned)(spread, width))
    for group, name, values in written:
        narrow = into @ (values.flatten(1) if values.ndim > 1 else values)
        group[name] = narrow.reshape(width, *values.shape[1:]).movedim(0, _WRITTEN[name])
    for name, there in [(name, stem[name]) for name in _STEM_NORM if name in stem]:
        stem[name] = (into if name.endswith("bias") else (into > 0).float()) @ there
    for block in blocks:
        for norm, readers in _READERS.items():
            weight, bias = block[f"{norm}.weight"], block[f"{norm}.bias"]
            for reader in readers:
                if f"{reader}.weight" in block:
                    reads = block[f"{reader}.weight"]
                    block[f"{reader}.bias"] = block[f"{reader}.bias"] + reads @ bias
                    block[f"{reader}.weight"] = (reads * weight) @ out
            block[f"{norm}.weight"], block[f"{norm}.bias"] = weight.new_ones(width), bias.new_zeros(width)


def _spread(written: Sequence[Tensor]) -> Tensor:
    """(D, D) float64: products of channels over (D, ...) that are written to them, each counting the same."""
    tiny = torch.finfo(torch.float64).tiny
    rows = [values.flatten(1) for values in written]
    spread = torch.stack([r @ r.T / r.square().sum().clamp_min(tiny) for r in rows]).sum(dim=0)
    return spread if bool(torch.isfinite(spread).all()) else torch.eye(len(spread)).double()


def _turned(spread: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Both s T (width, D) and T' / s (D, width): T keeps the lengths of what lies where most is written to.

    Of all such maps it is the one that comes nearest to leaving the first channels as they are: channels that
    were put behind the others need no turn.
    """
    there, scale = len(spread), (width / len(spread)) ** 0.5
    centre = torch.eye(there).double() - 1 / there
    basis = centre @ torch.linalg.eigh(centre @ spread @ centre).eigenvectors[:, 1 - min(width, there) :]
    ours = torch.linalg.qr(torch.eye(width).double() - 1 / width).Q[:, :-1]
    left, _, right = torch.linalg.svd(ours.T @ torch.eye(width, there).double() @ basis, full_matrices=False)
    turn = ours @ left @ right @ basis.T
    return scale * turn, turn.T / scale


def _chosen(spread: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """As `_turned`, where T chooses channels: those that have most to themselves, neither zeros nor twins.

    What reads the stream gets the others as they best follow from these.
    """
    from scipy.linalg import qr  # takes longer to import than all the rest

    order = qr(spread.numpy(), mode="r", pivoting=True)[1][:width]
    chosen = torch.zeros(width, len(spread)).double()
    chosen[range(len(order)), sorted(order)] = 1
    kept = chosen @ spread @ chosen.T
    scale = (width * spread.trace() / len(spread) / kept.trace().clamp_min(1e-300)).sqrt()
    follows = spread @ chosen.T @ torch.linalg.pinv(kept, rtol=1e-9, hermitian=True)
    return scale * chosen, follows / scale
