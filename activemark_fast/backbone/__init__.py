"""One view of an image tower, whatever library it comes from."""

from __future__ import annotations

from activemark_fast.backbone.finite import non_finite_tensor
from activemark_fast.backbone.probe import Layer
from activemark_fast.backbone.view import Backbone
from activemark_fast.towers import NoSuchTowerError, NotAViTError, evaluating

__all__ = ["Backbone", "Layer", "NoSuchTowerError", "NotAViTError", "evaluating", "non_finite_tensor"]
