"""Marking: how the mark gets into the weights, by a closed-form edit or by gradient steps."""
