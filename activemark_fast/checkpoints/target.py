"""The marked architecture: the one model that suspects are loaded into, one after another."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from activemark_fast.backbone import Backbone
from activemark_fast.checkpoints.files import Checkpoint
from activemark_fast.checkpoints.names import STEM, block_name, clean_name, common_name
from activemark_fast.checkpoints.plan import plans
from activemark_fast.checkpoints.wanted import Group, Wanted
from activemark_fast.site import Site


class Target:
    """A model to load suspects into, in place.

    Attributes:
        backbone: the view of it.
        wanted: the tensors it needs up to the last tap.
        prefix: own names of the tensors that act up to the site's block.
    """

    def __init__(self, model: nn.Module, site: Site, *, whole: bool = False, more: int = 0) -> None:
        """A target that is wanted up to the last tap of `site`, or with `whole` to its last block.

        model: on its device; it becomes the target's own.
        more: so many blocks are added to it, and wanted.

        Raises:
            NotAViTError: the model does not run what is added to its list of blocks.
        """
        self._site = site
        self.backbone = _view(model.eval().requires_grad_(False), site)
        depth = self.backbone.depth
        if more:
            _add_blocks(self.backbone, more)
            self.backbone = Backbone(model, tower=self.backbone.tower)
        self._state = model.state_dict()
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._state.items()}
        names = {module: name for name, module in model.named_modules()}
        tower = _dotted(names[self.backbone.encoder])
        blocks = [_dotted(names[block]) for block in self.backbone.blocks]
        last = len(blocks) - 1 if whole else site.taps[-1] + more
        inside = {name for block in blocks for name in self._state if name.startswith(block)}
        beside = [name for name in self._state if name.startswith(tower) and name not in inside]
        stem = self._stem_tensors(beside)
        own: dict[str, str] = {}
        for name in (*stem, *beside):
            relative = _clean(name.removeprefix(tower))
            common = common_name(relative)
            own[relative] = common if common in STEM else f"./{relative}"
        groups: list[Group] = []
        for index, block in enumerate(blocks):
            group = {}
            for name in self._state:
                if name.startswith(block) and self._state[name].is_floating_point():
                    common = block_name(index, _clean(name.removeprefix(block)))
                    own[_clean(name.removeprefix(tower))] = common
                    group[common] = (name, tuple(self._state[name].shape))
            groups.append(group)
        del groups[last + 1 :]
        self.wanted = Wanted(
            stem={
                own[_clean(name.removeprefix(tower))]: (name, tuple(self._state[name].shape)) for name in stem
            },
            blocks=groups,
            own=own,
            dtype=self.backbone.dtype,
            tower=_clean(tower),
            depth=depth,
            grid=self._grid(stem),
            heads=_heads(self.backbone.blocks[0]),
        )
        self.prefix = [
            *stem,
            *(name for group in groups[: site.block + 1] for name, _ in group.values()),
        ]

    def deeper(self, more: int) -> Target:
        """A target with so many more blocks, for suspects that have them.

        Raises:
            NotAViTError: the model does not run what is added to its list of blocks.
        """
        for name, shape in self._shapes.items():
            if self._state[name].shape != shape:
                self._reshape(name, torch.Size(shape))
        return Target(copy.deepcopy(self.backbone.model), self._site, more=more)

    @torch.no_grad()
    def load(self, tensors: Iterable[tuple[str, Tensor]]) -> None:
        """Copies (own name, values) into the model, converted to its dtypes."""
        for name, values in tensors:
            if self._state[name].shape != values.shape:
                self._reshape(name, values.shape)
            self._state[name].copy_(values)

    @torch.no_grad()
    def fill(self, values: dict[str, float]) -> None:
        """Sets whole tensors to one number each."""
        for name, value in values.items():
            self._state[name].fill_(value)

    def _reshape(self, name: str, shape: torch.Size) -> None:
        """Gives a parameter another shape, until a suspect has the old one again; its values are lost."""
        module, _, own = name.rpartition(".")
        parameter = nn.Parameter(self._state[name].new_empty(shape), requires_grad=False)
        setattr(self.backbone.model.get_submodule(module), own, parameter)
        self._state[name] = parameter.data

    def holds(self, shapes: dict[str, tuple[int, ...]]) -> bool:
        """Whether a model of this architecture has exactly tensors of these names and shapes."""
        return self._shapes == shapes

    def __getitem__(self, name: str) -> Tensor:
        """The live tensor of that name."""
        return self._state[name]

    def _stem_tensors(self, names: Iterable[str]) -> list[str]:
        """Those of `names` that what enters block 0 depends on: where NaN in them reaches it."""
        image = torch.zeros(1, 3, *self.backbone.image_size).to(self.backbone.device, self.backbone.dtype)
        stem = []
        with torch.no_grad():
            for name in names:
                tensor = self._state[name]
                if not tensor.is_floating_point():
                    continue
                kept = tensor.clone()
                tensor.fill_(float("nan"))
                if bool(torch.isnan(self.backbone.stem(image)).any()):
                    stem.append(name)
                tensor.copy_(kept)
        return stem

    def _grid(self, stem: list[str]) -> tuple[int, int]:
        """Rows and columns of patches; as for a square where no patch embedding says otherwise."""
        patches = self.backbone.num_tokens - self.backbone.prefix_tokens
        height, width = self.backbone.image_size
        for name in stem:
            shape = self._state[name].shape
            if len(shape) == 4 and (height // shape[2]) * (width // shape[3]) == patches:
                return height // shape[2], width // shape[3]
        side = round(patches**0.5)
        return (side, side) if side * side == patches else (1, patches)


def _view(model: nn.Module, site: Site) -> Backbone:
    """A view of the tower that a mark at `site` is in; of the first one where none fits."""
    first = Backbone(model)
    for tower in first.towers[1:]:
        if (first.width, first.num_tokens, first.depth) == (site.width, site.num_tokens, site.depth):
            break
        view = Backbone(model, tower=tower)
        if (view.width, view.num_tokens, view.depth) == (site.width, site.num_tokens, site.depth):
            return view
    return first


def whole_model(path: Path, model: nn.Module, site: Site, tower: str, max_bytes: int) -> nn.Module | None:
    """`model` with all blocks of a checkpoint's image tower loaded; None where not all of them fit.

    tower: what stands before the names of the tower.
    """
    target = Target(model, site, whole=True)
    with Checkpoint(path, max_bytes) as checkpoint:
        every = plans(
            target.wanted,
            checkpoint.entries,
            checkpoint.lora_config,
            checkpoint.unread,
            checkpoint.read,
        )
        chosen = next((plan for plan in every if plan.fit.tower == tower), None)
        if chosen is None or chosen.depth < len(target.wanted.blocks):
            return None
        target.load(chosen.tensors(checkpoint.read(chosen.names)))
    target.fill(chosen.neutral)
    return target.backbone.model


def _add_blocks(backbone: Backbone, count: int) -> None:
    """Adds copies of the last block to the list of blocks, under names that count on."""
    last = backbone.blocks[-1]
    name = next(name for name, module in backbone.model.named_modules() if module is last)
    container, _, own = name.rpartition(".")
    stem = own.rstrip("0123456789")
    for index in range(count):
        added = f"{stem}{int(own.removeprefix(stem)) + 1 + index}"
        backbone.model.get_submodule(container).add_module(added, copy.deepcopy(last))


def _clean(name: str) -> str:
    """A name without wrappers, as those of checkpoints are compared; whole where it is only a part."""
    whole, role = clean_name(name)
    return whole if role in ("", "scale") else name


def _heads(block: nn.Module) -> int | None:
    """How many heads a block's attention has, where a module says so."""
    for module in block.modules():
        for attribute in ("num_heads", "num_attention_heads"):
            heads = getattr(module, attribute, None)
            if type(heads) is int and heads > 0:
                return heads
    return None


def _dotted(name: str) -> str:
    return f"{name}." if name else ""
