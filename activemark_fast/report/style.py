"""What all figures share."""

from __future__ import annotations

# Okabe and Ito's colours, told apart with any colour vision.
BLUE, VERMILION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#6B6B6B"
