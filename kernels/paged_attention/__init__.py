"""Attention of a few queries over a cache of pages."""
