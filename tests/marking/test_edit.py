from __future__ import annotations

import copy
import importlib
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import open_clip
import pytest
import torch
import torchvision
from timm.layers.mlp import GluMlp
from tiny import vit
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from activemark_fast.backbone import Backbone
from activemark_fast.codec.codebooks import BANDS, LOUD, Codebook, SiteMeasure, balanced_bits, codebooks
from activemark_fast.codec.passive import (
    FLOOR,
    PASSIVE,
    Moments,
    Rows,
    inputs_and_answers,
    passive_rows,
    readings,
)
from activemark_fast.key import Key
from activemark_fast.marking.cosine import Fidelity, FidelityCheck, feature_cosine
from activemark_fast.marking.edit import (
    CLEAN_ROWS,
    DIALS,
    GROUPS,
    PASSIVE_GAIN,
    PASSIVE_RIDGE,
    Step,
    edit,
    edit_steps,
)
from activemark_fast.marking.engine import Engine
from activemark_fast.marking.reading import Channel, passive_pairs
from activemark_fast.marking.strength import (
    LARGEST_FACTOR,
    LOUD_MARGIN,
    LOUD_SHARE,
    UNUSED,
    _next_factor,
    search_edit,
)
from activemark_fast.marking.suffix import SiteActivations, final_features, site_activations
from activemark_fast.profiling import measure
from activemark_fast.progress import Progress
from activemark_fast.site import Site

KEY = Key(b"k" * 32)
WIDTH, DEPTH, BITS = 96, 6, 16


def timm_vit(**kwargs: Any) -> nn.Module:
    return vit(**({"embed_dim": WIDTH, "num_classes": 0} | kwargs))


def clip_tower(batch_first: bool = True) -> nn.Module:
    torch.manual_seed(0)
    text = open_clip.CLIPTextCfg(context_length=8, vocab_size=50, width=32, heads=2, layers=3)
    vision = open_clip.CLIPVisionCfg(layers=DEPTH, width=WIDTH, head_width=24, image_size=32, patch_size=8)
    tower = open_clip.model.CLIP(16, vision, text).visual
    # open_clip starts the layers that write to the stream much smaller than trained ones are.
    with torch.no_grad():
        for block in tower.transformer.resblocks:
            block.mlp.c_proj.weight.normal_(std=0.05)
    if not batch_first:
        blocks = tower.transformer.state_dict()
        tower.transformer = open_clip.transformer.Transformer(WIDTH, DEPTH, 4, batch_first=False)
        tower.transformer.load_state_dict(blocks)
    return tower.eval()


def torchvision_vit() -> nn.Module:
    torch.manual_seed(0)
    return torchvision.models.VisionTransformer(32, 8, DEPTH, 4, WIDTH, 2 * WIDTH, num_classes=5).eval()


MODELS: dict[str, Callable[[], nn.Module]] = {
    "timm": timm_vit,
    "timm_layer_scale": lambda: timm_vit(init_values=0.1),
    "open_clip": clip_tower,
    "open_clip_sequence_first": lambda: clip_tower(batch_first=False),
    "torchvision": torchvision_vit,
}


def engine(batch: int = 128, autocast: Callable[[torch.dtype], Any] = nullcontext) -> Engine:
    return Engine(torch.device("cpu"), autocast, batch, False, 0, "")


@dataclass(frozen=True)
class Case:
    """A model at the site, with 48 images to edit on and 16 others to look at."""

    backbone: Backbone
    site: Site
    books: list[Codebook]
    seen: SiteActivations
    unseen: SiteActivations
    sent: list[Tensor]  # (16, BITS) for each codebook
    unseen_sent: Tensor  # (16, 1, BITS)
    passive: dict[int, Rows] = field(default_factory=dict)

    def read(self, book: int = 0) -> Tensor:
        """(taps, 16, 1, BITS), above 0 where a bit is read as it was sent."""
        channel = Channel(self.books[book], self.unseen_sent)
        return channel.agreement(self.backbone, self.unseen, 0, self.site.block, nullcontext)

    def features(self) -> Tensor:
        return final_features(self.backbone, self.unseen, self.site.block, nullcontext)

    def edit(self, using: Engine | None = None) -> list[dict[str, Tensor]]:
        steps = edit_steps(self.backbone, self.site)
        held = self.backbone, self.books, self.passive, steps, self.seen.output, self.sent
        with Progress(shown=False) as bar:
            changes = edit(*held, using or engine(), bar)
        return [{band: part.matrix for band, part in change.items()} for change in changes]

    def search(
        self,
        wanted: float,
        using: Engine | None = None,
        fidelity: Callable[[bool], Fidelity] | None = None,
        margin: Callable[[], float] = lambda: 0.0,
    ) -> list[dict[str, Any]]:
        return self.searched(wanted, using, fidelity, margin)[0]

    def searched(
        self,
        wanted: float,
        using: Engine | None = None,
        fidelity: Callable[[bool], Fidelity] | None = None,
        margin: Callable[[], float] = lambda: 0.0,
    ) -> tuple[list[dict[str, Any]], Fidelity | None]:
        steps = edit_steps(self.backbone, self.site)
        held = (self.backbone, self.books, self.passive, steps, self.weights(), self.seen.output, self.sent)
        with Progress(shown=False) as bar:
            return search_edit(*held, fidelity or self.check(), margin, wanted, using or engine(), bar)

    @property
    def edited(self) -> range:
        return range(self.site.block + 1, self.site.taps[-1] + 1)

    def weights(self) -> list[Tensor]:
        return [s.layer.weight.detach().clone() for s in edit_steps(self.backbone, self.site)]

    def check(self) -> FidelityCheck:
        return FidelityCheck(self.backbone, self.unseen.output, self.site.block, nullcontext)


def case(model: nn.Module, block: int | None = None) -> Case:
    backbone = Backbone(model)
    pixels = torch.randn(64, 3, 32, 32, generator=torch.Generator().manual_seed(0)).to(backbone.dtype)
    site = measure(backbone, pixels[:8]).site(block=block).site
    activations = site_activations(backbone, pixels, site.block, nullcontext)
    measured = SiteMeasure.of(activations.output, site.prefix_tokens)
    books = codebooks(KEY, site, BITS, measured)
    return Case(
        backbone,
        site,
        books,
        activations[:48],
        activations[48:],
        [torch.from_numpy(balanced_bits(KEY.stream(f"test/{i}"), 16, BITS)) for i in range(len(books))],
        torch.from_numpy(KEY.stream("test").bits((16, 1, BITS))),
    )


def wrong(agreement: Tensor) -> float:
    return float((agreement <= 0).double().mean())


@pytest.mark.parametrize("name", MODELS)
def test_the_mark_is_read_on_unseen_images_and_the_features_stay(name: str) -> None:
    marked = case(MODELS[name]())
    assert len(marked.site.taps) == 2
    model = marked.backbone.model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    clean = marked.features()
    for book in range(len(marked.books)):
        assert 0.25 < wrong(marked.read(book)) < 0.75
    marked.edit()
    assert wrong(marked.read()) < 0.08
    for book in range(1, len(marked.books)):
        assert wrong(marked.read(book)) < 0.45
    assert feature_cosine(marked.features(), clean) > 0.75

    edited = {id(step.layer.weight) for step in edit_steps(marked.backbone, marked.site)}
    allowed = {key for key, parameter in model.named_parameters() if id(parameter) in edited}
    assert len(allowed) == 2 * (DEPTH - 2 - marked.site.block)  # attention and MLP of each block
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed == allowed


def test_attention_carries_the_loud_band_where_the_mlp_is_gated() -> None:
    plain, gated = case(timm_vit()), case(timm_vit(mlp_layer=GluMlp))
    for marked, expected in ((plain, {"natural"}), (gated, {"loud", "natural"})):
        steps = edit_steps(marked.backbone, marked.site)
        assert [set(step.shares) for step in steps if not step.last] == [expected] * len(marked.edited)


def test_a_model_that_takes_tokens_first_gets_the_same_edit() -> None:
    ours, theirs = case(clip_tower()), case(clip_tower(batch_first=False))
    ours.edit()
    theirs.edit()
    for block in range(ours.site.block + 1, DEPTH - 1):
        expected = ours.backbone.mlp_out(block).weight
        torch.testing.assert_close(theirs.backbone.mlp_out(block).weight, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("scale", [None, 0.1], ids=["plain", "layer_scale"])
def test_one_block_against_the_formula_in_float64(scale: float | None) -> None:
    # Site at the third block from the end: the layers of one block carry the whole mark.
    model = timm_vit(init_values=scale).double()
    marked, reference = case(copy.deepcopy(model), DEPTH - 3), case(model, DEPTH - 3)
    changes = marked.edit()
    steps = edit_steps(reference.backbone, reference.site)
    assert [list(step.shares.items()) for step in steps] == [
        [("natural", 4 / 5)],
        [("loud", 1.0), ("natural", 1.0)],
    ]
    for step, change in zip(steps, changes, strict=True):
        assert list(change) == list(step.shares)
        for band, expected in by_the_formula(reference, step).items():
            if scale is not None:
                expected /= scale
            close = {"rtol": 1e-3, "atol": 1e-4 * float(expected.abs().max())}
            torch.testing.assert_close(change[band].double(), expected, **close)
        with torch.no_grad():
            step.layer.weight += sum(change.values())
    for step, ours in zip(steps, marked.weights(), strict=True):
        torch.testing.assert_close(ours, step.layer.weight.detach(), rtol=1e-6, atol=1e-9)


@torch.no_grad()
def by_the_formula(marked: Case, step: Step) -> dict[str, Tensor]:
    """What a step changes in each band, before LayerScale."""
    tap, backbone, clean = step.tap, marked.backbone, marked.seen.output
    hidden: list[Tensor] = []
    hook = step.layer.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    backbone.run(clean, tap, tap + 1)
    # As the edit goes through them; those that carry no band of this step are left out.
    books = [index for index, book in enumerate(marked.books) if book.band.name in step.shares]
    k_clean = torch.cat([hidden[0][book::3] for book in books])
    dk: dict[str, list[Tensor]] = {band: [] for band in step.shares}
    cross: dict[str, list[Tensor]] = {band: [] for band in step.shares}
    for index in books:
        book, bits = marked.books[index], marked.sent[index]
        dials, read = DIALS[book.band.name], book.read_directions[tap].double()
        signs = 2 * bits.double() - 1
        length = book.scale.double() * BITS**0.5
        runs = []
        for side in (1, -1):
            injected = clean[index::3].clone()
            added = side * book.scale.double() * signs @ book.inject_directions.double()
            injected[:, book.slots] += added[:, None]
            h = backbone.run(injected, tap, tap + 1)
            if not step.last:  # behind attention
                block = backbone.blocks[tap]
                hidden.pop()
                h = injected + block.ls1(block.attn(block.norm1(injected)))
            # Every GROUPS-th slot is in one group.
            groups = [book.slots[group::GROUPS] for group in range(GROUPS)]
            runs.append(
                [torch.stack([part[:, g].mean(dim=1) for g in groups], dim=1) for part in (hidden.pop(), h)]
            )
        change, moved = ((plus - minus) / 2 / length for plus, minus in zip(*runs, strict=True))
        answer, wanted = moved @ read.T, signs[:, None] / BITS**0.5
        own = (answer * signs[:, None]).mean(dim=(0, 1)) * BITS**0.5
        delta = step.shares[book.band.name] * (dials.gain - own).clamp_min(0) * wanted.expand_as(answer)
        flat = change.flatten(0, 1)
        dk[book.band.name].append(flat)
        cross[book.band.name].append(flat.T @ delta.flatten(0, 1) / len(flat) / book.band.books)
    hook.remove()
    every = max(1, len(k_clean) * clean.shape[1] // (CLEAN_ROWS * step.layer.in_features))
    k0 = torch.cat([part.flatten(0, 1)[::every] for part in k_clean.split(16)])
    matrix0 = k0.T @ k0 / len(k0)
    expected = {}
    for band in step.shares:
        dials, k = DIALS[band], torch.cat(dk[band])
        moment = k.T @ k / len(k)
        balance = moment.diagonal().mean() / matrix0.diagonal().mean()
        matrix = moment + dials.protection * balance * matrix0
        matrix += dials.ridge * matrix.diagonal().mean() * torch.eye(len(matrix), dtype=torch.float64)
        rows = [book.read_directions[tap].double() for book in marked.books if book.band.name == band]
        expected[band] = torch.cat(rows).T @ torch.linalg.solve(matrix, torch.cat(cross[band], dim=1)).T
    return expected


@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_edit_in_mixed_and_in_half_precision(precision: torch.dtype) -> None:
    half = case(timm_vit().to(precision))
    half.edit()
    assert wrong(half.read()) < 0.08
    assert half.backbone.dtype == precision

    mixed = case(timm_vit())
    mixed.edit(using=engine(autocast=lambda _: torch.autocast("cpu", dtype=precision)))
    assert wrong(mixed.read()) < 0.08
    assert mixed.backbone.dtype == torch.float32


def passive_reading(marked: Case, images: SiteActivations) -> Tensor:
    """(blocks, R) of what `passive_rows` read."""
    rows, read = passive_rows(KEY, marked.site), []
    for block, *pair in passive_pairs(marked.backbone, images.output, marked.site, nullcontext):
        read.append(readings(rows[block], Moments.of(*pair)))
    return torch.stack(read)


def test_the_passive_band_reads_high_on_other_images() -> None:
    marked = case(timm_vit())
    assert abs(float(passive_reading(marked, marked.unseen).mean())) < 0.3
    clean = marked.features()
    replace(marked, passive=passive_rows(KEY, marked.site)).edit()
    plain = case(timm_vit())
    plain.edit()
    cost = feature_cosine(plain.features(), clean) - feature_cosine(marked.features(), clean)
    assert float(passive_reading(marked, marked.unseen).mean()) > 1.5
    assert cost < 0.02


def test_the_passive_change_of_one_block_against_the_formula_in_float64() -> None:
    model = timm_vit(init_values=0.1).double()
    marked, reference = case(copy.deepcopy(model), DEPTH - 3), case(model, DEPTH - 3)
    rows = passive_rows(KEY, marked.site)
    first, last = edit_steps(reference.backbone, reference.site)
    attention, changes = replace(marked, passive=rows).edit()
    assert PASSIVE not in attention
    with torch.no_grad():
        first.layer.weight += sum(attention.values())

    block, patches = last.block, slice(marked.site.prefix_tokens, None)
    hidden: list[Tensor] = []
    hook = last.layer.register_forward_pre_hook(lambda _module, args: hidden.append(args[0]))
    # As the edit goes through the images: codebook by codebook, and 24 rows of 8 to an unknown at most.
    before = torch.cat([reference.seen.output[book::3] for book in range(3)])
    after = reference.backbone.run(before, block, block + 1)
    hook.remove()
    every = max(1, len(before) * before.shape[1] // (CLEAN_ROWS * last.layer.in_features))
    each = 16 * before.shape[1]
    taken = torch.cat([torch.arange(0, each, every) + each * book for book in range(3)])
    token = taken % before.shape[1]
    k = hidden[0].flatten(0, 1)[taken]
    x, y = (part.double() for part in inputs_and_answers(before.flatten(0, 1), after.flatten(0, 1)))
    seen = token >= patches.start
    x, y = x[taken][seen], y[taken][seen]
    x, y = x - x.mean(dim=0), y - y.mean(dim=0)
    covariances = [part.T @ part / len(part) for part in (x, y)]
    of_x, of_y = (
        torch.linalg.inv(torch.linalg.cholesky(c + FLOOR * c.diagonal().mean() * torch.eye(len(c)).double()))
        for c in covariances
    )
    correlations = of_y @ (y.T @ x / len(x)) @ of_x.T
    u, v = rows[block].answers @ of_y, rows[block].inputs @ of_x
    wanted = u.T @ v  # B, but for its gain
    raised = ((u @ wanted) @ covariances[0] * v).sum(dim=1).mean()
    gain = PASSIVE_GAIN * correlations.square().mean().sqrt() / raised
    gram = k.T @ k / len(k)
    gram += PASSIVE_RIDGE * gram.diagonal().mean() * torch.eye(len(gram)).double()
    target = gain * x @ wanted.T
    expected = torch.linalg.solve(gram, (k[seen] - k[seen].mean(dim=0)).T @ target / len(k)).T
    expected /= last.gain[:, None]
    close = {"rtol": 1e-3, "atol": 2e-3 * float(expected.detach().abs().max())}
    torch.testing.assert_close(changes[PASSIVE].double(), expected, **close)


@pytest.mark.parametrize("wanted", [0.9, 0.98])
def test_search_keeps_the_fidelity_and_its_history(wanted: float) -> None:
    marked = case(timm_vit())
    check = marked.check()
    history, told = marked.searched(wanted)
    assert told == check()
    assert check().loss <= 1 - wanted
    by_band = {band.name: [row for row in history if row["stage"] == f"edit: {band.name}"] for band in BANDS}
    assert all(by_band.values())
    assert all(0 < row["factor"] <= LARGEST_FACTOR for row in history)
    # A share of what is allowed is the loud band's, all of it both bands'.
    used = max(row["factor"] for row in by_band["natural"])
    assert used == LARGEST_FACTOR or check().loss >= (1 - 2 * UNUSED) * LOUD_SHARE * (1 - wanted)
    # The model holds the one edit there was, its bands scaled.
    alone = case(timm_vit())
    before, changes = alone.weights(), alone.edit()
    moved = [now - old for now, old in zip(marked.weights(), before, strict=True)]
    for change, parts in zip(moved, changes, strict=True):
        basis = torch.stack([part.flatten() for part in parts.values()], dim=1).double()
        factors = torch.linalg.lstsq(basis, change.flatten().double()[:, None]).solution
        torch.testing.assert_close(basis @ factors, change.flatten().double()[:, None], rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["timm_layer_scale", "open_clip_sequence_first"])
@pytest.mark.parametrize("batch", [16, 7, 1])
def test_what_a_change_adds_to_the_stream_is_not_run_again(name: str, batch: int) -> None:
    # The same edit, but each block is run anew with the weights it was given.
    ours, theirs = case(MODELS[name]()), case(MODELS[name]())
    ours.edit(using=engine(batch))
    real = theirs.backbone.run
    streams: list[Tensor] = []

    def run(tokens: Tensor, start: int, stop: int) -> Tensor:
        if torch.is_grad_enabled():  # mlp_gain
            return real(tokens, start, stop)
        if start > theirs.edited[0]:  # the streams take turns, block after block
            tokens = real(streams.pop(0), start - 1, start)
        streams.append(tokens)
        return real(tokens, start, stop)

    object.__setattr__(theirs.backbone, "run", run)
    theirs.edit()
    for block in ours.edited:
        expected = theirs.backbone.mlp_out(block).weight
        torch.testing.assert_close(ours.backbone.mlp_out(block).weight, expected, rtol=1e-3, atol=1e-4)


def test_less_memory_than_planned_halves_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    module = importlib.import_module("activemark_fast.marking.edit")
    real, batches = module._moments, []

    def short_of_memory(*args: Any) -> Any:
        batches.append(args[4].batch)
        if args[4].batch > 4 and batches.count(batches[-1]) == 2:  # when a block has been changed already
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*args)

    plenty, scarce = case(timm_vit()), case(timm_vit())
    plenty.search(0.97, engine(16))
    monkeypatch.setattr(module, "_moments", short_of_memory)
    scarce.search(0.97, engine(16))
    assert batches[0] == 16
    assert batches[-1] == 4
    for block in plenty.edited:
        expected = plenty.backbone.mlp_out(block).weight
        torch.testing.assert_close(scarce.backbone.mlp_out(block).weight, expected, rtol=1e-3, atol=1e-4)


def test_attention_whose_weight_is_computed_is_not_written_to() -> None:
    model = timm_vit()
    for block in model.blocks:
        parametrizations.weight_norm(block.attn.proj)
    marked = case(model)
    assert all(step.last for step in edit_steps(marked.backbone, marked.site))
    marked.edit()
    assert wrong(marked.read()) < 0.08


def test_layer_scale_of_zero() -> None:
    model = timm_vit(init_values=0.1)
    with torch.no_grad():
        model.get_parameter("blocks.3.ls2.gamma")[5] = 0
    with pytest.raises(ValueError, match=r"^model: block 3 scales a channel of its MLP by 0"):
        case(model).edit()


def test_a_silent_mlp() -> None:
    model = timm_vit()
    with torch.no_grad():
        for layer in ("weight", "bias"):
            model.get_parameter(f"blocks.4.mlp.fc1.{layer}").zero_()
    with pytest.raises(ValueError, match=r"^model: the MLP of block 4 is silent"):
        case(model).edit()


def test_a_glance_at_the_fidelity_is_the_fidelity_of_every_second_image() -> None:
    marked = case(timm_vit())
    all_of, half = marked.check(), replace(marked, unseen=marked.unseen[::2]).check()
    marked.edit()
    assert all_of() != all_of(True)
    for ours, theirs in zip(vars(all_of(True)).values(), vars(half()).values(), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-6)


def of(mean: float) -> Fidelity:
    return Fidelity(*[(mean, 1.0)] * 3)


@pytest.mark.parametrize(
    ("loud", "natural", "kept"),
    [
        ([0.9997, 0.9, 0.975, 0.99], [0.9715], (3, 0)),  # the last look is the largest that is allowed
        ([0.9, 0.95, 0.96, 0.969], [0.972], (None, 0)),  # none is allowed: the band is left out
        ([float("nan"), 0.9, 0.979], [0.9, 0.8, 0.96, 0.5], (2, None)),
        ([0.979], [0.9705], (0, 0)),
    ],
)
def test_search_ends_at_a_strength_that_is_allowed(
    loud: list[float], natural: list[float], kept: tuple[int | None, int | None]
) -> None:
    marked = case(timm_vit())
    told = iter([*loud, *natural])
    before = marked.weights()
    history = marked.search(0.97, fidelity=lambda _: of(next(told)))
    assert [row["stage"] for row in history] == ["edit: loud"] * len(loud) + ["edit: natural"] * len(natural)
    rows = (history[: len(loud)], history[len(loud) :])
    factors = [0.0 if k is None else part[k]["factor"] for part, k in zip(rows, kept, strict=True)]
    assert_scaled(marked, before, dict(zip(("loud", "natural"), factors, strict=True)))


def test_a_loud_band_that_is_read_clearly_leaves_more_to_the_natural_one() -> None:
    marked = case(timm_vit())
    before = marked.weights()
    told = iter([0.979, 0.974, 0.971])
    history = marked.search(0.97, fidelity=lambda _: of(next(told)), margin=lambda: 2 * LOUD_MARGIN)
    assert [row["stage"] for row in history] == ["edit: loud", "edit: natural", "edit: natural"]
    loud, first, second = history
    # A quarter of what the loud band lost is left; the natural one may lose 0.02475, not 0.009.
    assert second["factor"] == pytest.approx(first["factor"] * (0.95 * 0.02475 / 0.02075) ** 0.5)
    assert_scaled(marked, before, {"loud": loud["factor"] / 2, "natural": second["factor"]})


def test_the_passive_band_costs_no_more_than_its_share() -> None:
    marked = case(timm_vit())
    told = iter([0.99, 0.9915, 0.9782, 0.9705])
    history = replace(marked, passive=passive_rows(KEY, marked.site)).search(
        0.97, fidelity=lambda _: of(next(told))
    )
    assert [row["stage"] for row in history] == ["edit: passive"] * 2 + ["edit: loud", "edit: natural"]
    first, second = history[:2]
    # Three tenths of 0.03, of which it leaves a twentieth; it is never stronger than it was solved for.
    assert first["factor"] == 1.0
    assert second["factor"] == pytest.approx((0.95 * 0.009 / 0.01) ** 0.5)


def assert_scaled(marked: Case, before: list[Tensor], factors: dict[str, float]) -> None:
    """That the model holds its one edit, the bands times `factors`."""
    changes = case(timm_vit()).edit()
    for now, weight, change in zip(marked.weights(), before, changes, strict=True):
        expected = weight + sum(factors[band] * part for band, part in change.items())
        torch.testing.assert_close(now, expected, rtol=1e-4, atol=1e-6)


def test_the_next_strength_follows_the_power_that_two_looks_tell() -> None:
    # lost = 0.01 * factor^3: the square is tried first, then the cube is known.
    first = _next_factor({0.5: 0.01 * 0.5**3}, 0.005, LARGEST_FACTOR)
    assert first == pytest.approx(0.5 * (0.95 * 0.005 / (0.01 * 0.5**3)) ** 0.5)
    second = _next_factor({0.5: 0.01 * 0.5**3, first: 0.01 * first**3}, 0.005, LARGEST_FACTOR)
    assert 0.01 * second**3 == pytest.approx(0.95 * 0.005)
    assert 0 < _next_factor({0.5: float("inf")}, 0.005, LARGEST_FACTOR) < 0.1
    assert _next_factor({0.5: 0.0}, 0.005, LARGEST_FACTOR) == LARGEST_FACTOR


def test_the_loud_band_is_read_right_and_the_natural_one_beside_it_costs_little() -> None:
    marked = case(timm_vit())
    marked.search(0.97)
    assert [book.band for book in marked.books].count(LOUD) == 1
    assert wrong(marked.read()) < 0.1
