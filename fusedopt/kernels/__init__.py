"""Triton device code: the multi-tensor step driver, formats, rounding, reductions."""
