"""Exact attention over blocks; `api.attention` is the public op."""
