"""Prefill by chunks and decoding."""
