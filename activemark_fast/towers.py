"""Where in a model the image towers are, and how one is given images.

A *tower* is the innermost module around some list of blocks whose forward takes images. Each is found by
structure and by trying: a language model beside it is never run further than its refusal of images.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from activemark_fast.following import computed_on

MIN_BLOCKS = 3
LOOKED_FOR = f"a list of at least {MIN_BLOCKS} blocks of one class that keep the shape of what they take"
USUAL_SIZE = (224, 224)
"""Pixels of the images that a model is tried with which does not say its own."""
_IMAGE_SIZES = (
    "patch_embed.img_size",
    "stem.img_size",
    "img_size",
    "image_size",
    "input_resolution",
    "config.image_size",
    "config.crop_size",
    "pretrained_cfg.input_size",
)
_FRAMES = ("config.num_frames", "config.frames_per_clip")
_PATCH_COUNTS = ("embeddings.num_patches", "embeddings.patch_embeddings.num_patches")


class NotAViTError(ValueError):
    """The model cannot be viewed as a tower of blocks; the message says what was looked for and found."""


class NoSuchTowerError(ValueError):
    """The model has no image tower of the name asked for; the message says which it has."""


class Stop(Exception):
    """Ends a forward pass, and carries what a module was called with, or made, out of it."""

    def __init__(self, *carried: Any) -> None:
        super().__init__()
        self.carried = carried


@dataclass(frozen=True, eq=False)
class Tower:
    """A module whose forward takes images, and the lists of blocks in it.

    Attributes:
        name: its dotted name in the model; empty for the model itself.
        owners: the modules from the model down to the tower, both included.
        image_size: (height, width) in pixels.
        lists: the blocks of each list, by the list's dotted name in the tower.
    """

    name: str
    owners: list[nn.Module]
    image_size: tuple[int, int]
    lists: dict[str, tuple[nn.Module, ...]]

    @property
    def module(self) -> nn.Module:
        """The tower."""
        return self.owners[-1]

    @property
    def longest(self) -> int:
        """Blocks in its longest list."""
        return max(map(len, self.lists.values()))


def find_towers(model: nn.Module, image_size: tuple[int, int] | None) -> list[Tower]:
    """The towers of a model, the one with the longest list of blocks first.

    Raises:
        NotAViTError: there is none.
    """
    lists = _lists(model)
    if not lists:
        raise NotAViTError(f"looked for {LOOKED_FOR}; found none in {type(model).__name__}")
    towers: dict[str, Tower] = {}
    sees_pixels = any(map(_sees_pixels, model.modules()))
    refusals: dict[str, str] = {}
    for name, blocks in lists.items():
        owners = _owners(model, name)
        for count in range(len(owners) - 1, 0, -1):
            path, owner = ".".join(name.split(".")[: count - 1]) if name else "", owners[count - 1]
            inner = name[len(path) :].lstrip(".")
            if type(owner).forward is nn.Module.forward or (path and isinstance(owner, nn.Sequential)):
                continue
            if sees_pixels and not any(map(_sees_pixels, owner.modules())):
                continue
            if path in towers and _same_branch(towers[path], inner):
                towers[path].lists[inner] = blocks
                break
            size = image_size or first_fact(reversed(owners), _IMAGE_SIZES, pair)
            refusal = _refusal(owner, blocks, size or USUAL_SIZE)
            if refusal is None:
                towers.setdefault(path, Tower(path, owners[:count], size or USUAL_SIZE, {}))
                towers[path].lists[inner] = blocks
                break
            told = f"{len(blocks)} blocks {type(blocks[0]).__name__} in {type(owner).__name__}"
            asked = "" if size else f"; image_size: not given, and it has none of {', '.join(_IMAGE_SIZES)}"
            refusals[name] = f"{told}, which {refusal}{asked}"
    if not towers:
        longest = max(lists, key=lambda name: len(lists[name]))
        raise NotAViTError(f"looked for {LOOKED_FOR}; found {refusals.get(longest, 'none that sees images')}")
    return sorted(towers.values(), key=lambda tower: -tower.longest)


def _same_branch(tower: Tower, inner: str) -> bool:
    """Whether a list lies in the same child of the tower as one that images are known to reach."""
    return any(inner.partition(".")[0] == known.partition(".")[0] for known in tower.lists)


def feed(tower: nn.Module, images: Tensor) -> Any:
    """What a tower makes of `images` (B, 3, H, W), handed over in the form that its forward asks for.

    Videos are of equal frames; patches are packed image by image, as a fixed grid; what a masking model would
    mask is kept.
    """
    asked = inspect.signature(tower.forward).parameters
    with _masking_off(tower):
        if "grid_thw" in asked:
            return _of_merged_patches(tower, images, "merge_sizes" in asked)
        if "spatial_shapes" in asked:
            return tower(*_flat_patches(tower, images))
        if "target_sizes" in asked:
            return tower(*_patches_in_a_row(tower, images))
        if "aspect_ratio_ids" in asked:
            return tower(*_tiles(tower, images))
        if isinstance(getattr(tower, "patch_embedding", None), nn.Linear):
            return tower(_flat_patches(tower, images)[0])
        more: dict[str, Any] = {}
        frames = first_fact([tower], _FRAMES, whole)
        if frames:
            images = images[:, None].expand(-1, frames, -1, -1, -1)
        if "noise" in asked:  # the order in which patches would be masked
            patches = first_fact([tower], _PATCH_COUNTS, whole) or 0
            more["noise"] = torch.arange(patches, device=images.device).expand(len(images), -1)
        if "skip_predictor" in asked:
            more["skip_predictor"] = True
        return tower(images, **more)


def pair(value: Any) -> tuple[int, int] | None:
    """A size in pixels as (height, width), from one number, (height, width) or (channels, height, width)."""
    if isinstance(value, dict):
        value = (value.get("height"), value.get("width"))
    sizes = (
        [value, value]
        if isinstance(value, int)
        else list(value)[-2:]
        if isinstance(value, tuple | list)
        else []
    )
    if len(sizes) != 2 or not all(whole(s) for s in sizes):
        return None
    return sizes[0], sizes[1]


def whole(value: Any) -> int | None:
    """A whole number that is not negative."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None


def first_fact(owners: Iterator[nn.Module] | Sequence[nn.Module], paths: Sequence[str], read: Any) -> Any:
    """The first of the attributes `paths` of the first of the owners that `read` understands, or None."""
    for owner in owners:
        for path in paths:
            value: Any = owner
            for part in path.split("."):
                value = value.get(part) if isinstance(value, dict) else getattr(value, part, None)
            fact = None if value is None else read(value)
            if fact is not None:
                return fact
    return None


def first_matrix(module: nn.Module) -> Tensor:
    """The parameter of most dimensions, which tells device and dtype (norms may be kept wider)."""
    return max((p for p in module.parameters() if p.is_floating_point()), key=lambda p: p.ndim)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Eval mode for a while; every submodule's training flag is put back."""
    training = [m for m in module.modules() if m.training]  # few or none: setting a flag is slow
    for m in training:
        m.training = False
    try:
        yield
    finally:
        for m in training:
            m.training = True


def random_images(count: int, size: tuple[int, int], like: Tensor) -> Tensor:
    """(count, 3, H, W) of noise, the same for everybody, in the dtype of `like`, where that is computed."""
    images = torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(count), dtype=torch.float32)
    return images.to(computed_on(like.device), like.dtype)


def shape_of(size: tuple[int, int]) -> str:
    """What images a tower is given, in words."""
    return f"images of shape (B, 3, {size[0]}, {size[1]})"


def _lists(model: nn.Module) -> dict[str, tuple[nn.Module, ...]]:
    """Every list of blocks of one class, by its dotted name."""
    found: dict[str, tuple[nn.Module, ...]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.Sequential):
            continue
        children = [c for c in module if type(c) not in (nn.Sequential, nn.ModuleList)]
        common = Counter(type(c) for c in children).most_common(1)
        if common and common[0][1] >= MIN_BLOCKS:
            blocks = tuple(c for c in children if type(c) is common[0][0])
            if any(p.is_floating_point() for p in blocks[0].parameters()):
                found[name] = blocks
    # Lists of single layers within a block are no lists of blocks.
    return {name: blocks for name, blocks in found.items() if any(True for b in blocks for _ in b.children())}


def _owners(model: nn.Module, name: str) -> list[nn.Module]:
    """The modules from the model down to the one of that dotted name."""
    owners = [model]
    for part in name.split(".") if name else []:
        owners.append(owners[-1].get_submodule(part))
    return owners if name else [model, model]


def _sees_pixels(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d | nn.Conv3d) and module.in_channels == 3


def _refusal(owner: nn.Module, blocks: Sequence[nn.Module], size: tuple[int, int]) -> str | None:
    """Why `owner` is no tower around `blocks`, or None: images given to it reach the first that it calls."""
    images = random_images(1, size, first_matrix(blocks[0]))

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        raise Stop(*args, *kwargs.values())

    handles = [block.register_forward_pre_hook(stop, with_kwargs=True) for block in blocks]
    try:
        with evaluating(owner), torch.no_grad():
            feed(owner, images)
    except Stop as stopped:
        given = next((value for value in stopped.carried if isinstance(value, Tensor)), None)
        same = (
            given is not None
            and given.numel() == images.numel()
            and torch.equal(given.flatten().sort().values, images.flatten().sort().values)
        )
        return "hands the images to its blocks as they are" if same else None
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        first, *others = inspect.signature(owner.forward).parameters.values()
        wanted = [p.name for p in others if p.default is p.empty and p.kind is p.POSITIONAL_OR_KEYWORD]
        if first.name == "input_ids":
            return "takes token ids, and images only beside them"
        if wanted and isinstance(error, TypeError):
            return f"does not take images alone: it wants {', '.join(wanted)} too"
        told = f"does not take {shape_of(size)}: {type(error).__name__}: {error}"
        return " ".join(told.split())
    finally:
        for handle in handles:
            handle.remove()
    return "the forward pass does not call"


@contextmanager
def _masking_off(tower: nn.Module) -> Iterator[None]:
    """A masking model keeps all patches for a while."""
    config: Any = getattr(tower, "config", None)
    ratio = getattr(config, "mask_ratio", None)
    if ratio is None:
        yield
        return
    config.mask_ratio = 0.0
    try:
        yield
    finally:
        config.mask_ratio = ratio


def _patches(images: Tensor, side: int) -> Tensor:
    """(B, 3, H, W) → (B, rows, columns, 3, side, side)."""
    return images.unfold(2, side, side).unfold(3, side, side).permute(0, 2, 3, 1, 4, 5)


def _merged_patches(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (B * n, 3, T, side, side) in the order that their merger wants, and (B, 3) grids."""
    side = first_fact([tower], ("config.patch_size", "patch_size"), whole)
    merge = first_fact([tower], ("config.spatial_merge_size", "spatial_merge_size"), whole) or 1
    frames = first_fact([tower], ("config.temporal_patch_size",), whole) or 1
    cut = _patches(images, side or 1)
    count, rows, columns = cut.shape[:3]
    merged = cut.unflatten(2, (columns // merge, merge)).unflatten(1, (rows // merge, merge))
    ordered = merged.transpose(2, 3).flatten(0, 4)  # (B * n, 3, side, side)
    grid = torch.tensor([[1, rows, columns]] * count, device=images.device)
    return ordered[:, :, None].expand(-1, -1, frames, -1, -1), grid


def _of_merged_patches(tower: nn.Module, images: Tensor, sized: bool) -> Any:
    """What a tower makes of packed patches: flat, or (n, 3, side, side), or (1, n, 3, side, side).

    sized: it asks for each image's merge size, too, which is 1.

    Which of these it takes shows only when it is run; where it takes none, it is the first that it refuses.
    """
    patches, grid = _merged_patches(tower, images)
    square = patches[:, :, 0]
    sizes = [torch.ones(len(images), dtype=torch.int64, device=images.device)] if sized else []
    refusals: list[Exception] = []
    for form in (patches.flatten(1), square, square[None]):
        try:
            return tower(form, grid, *sizes)
        except (RuntimeError, ValueError) as error:
            refusals.append(error)
    raise refusals[0]


def _flat_patches(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Patches (B, n, side * side * 3), which of them are there (B, n), and (B, 2) grids."""
    side = first_fact([tower], ("config.patch_size",), whole)
    cut = _patches(images, side or 1)
    count, rows, columns = cut.shape[:3]
    flat = cut.permute(0, 1, 2, 4, 5, 3).flatten(3).flatten(1, 2)
    there = torch.ones(count, rows * columns, dtype=torch.int64, device=images.device)
    return flat, there, torch.tensor([[rows, columns]] * count, device=images.device)


def _patches_in_a_row(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    """Patches (1, 3, side, B * n * side), beside one another, and (B, 2) grids."""
    side = first_fact([tower], ("config.patch_size",), whole)
    cut = _patches(images, side or 1)
    count, rows, columns = cut.shape[:3]
    row = cut.permute(3, 4, 0, 1, 2, 5).flatten(2)
    return row[None], torch.tensor([[rows, columns]] * count, device=images.device)


def _tiles(tower: nn.Module, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The image as each of its tiles, (B, 1, T, 3, H, W), the first layout of tiles, and which are there."""
    count = first_fact([tower], ("config.max_num_tiles",), whole) or 1
    ones = torch.ones(len(images), 1, count, dtype=torch.int64, device=images.device)
    return images[:, None, None].expand(-1, -1, count, -1, -1, -1), ones[..., 0], ones
