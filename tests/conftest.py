from __future__ import annotations

import os

import torch
from hypothesis import settings

# The models are too small for more: on a busy machine threads would only wait for each other.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
settings.register_profile("activemark_fast", deadline=None, derandomize=True)
settings.load_profile("activemark_fast")
