"""Triton kernels; the plain torch version that each agrees with stands in `models`."""
