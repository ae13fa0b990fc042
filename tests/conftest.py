from __future__ import annotations

import torch
from hypothesis import settings

torch.set_num_threads(2)
settings.register_profile("activemark_fast", deadline=None, derandomize=True)
settings.load_profile("activemark_fast")
