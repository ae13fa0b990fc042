"""Baselines: other ways to prove ownership, to compare with. Each is a module with `generate` and `verify`.

`reference_recipe` marks a model as the ActiveMark paper does; `ipguard` and `adv_tra` leave the model alone
and take fingerprints of the decision boundaries of a `Classifier`. They are written from their papers.
"""

from activemark_fast.baselines.common import Classifier, Cost, Finding

__all__ = ["Classifier", "Cost", "Finding"]
