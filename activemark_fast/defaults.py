"""What holds where nobody says otherwise: in Python, on the command line and in what is printed."""

from __future__ import annotations

ALPHA = 1e-6
"""A suspect whose p-value, after all that was paid for, is at most this one matches."""
FIDELITY = 0.998
"""Lowest mean cosine to the original's features, on natural images held out, that a mark may leave."""
