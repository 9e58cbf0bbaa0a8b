"""Held-out bits per byte, long-context tasks, isolation, and pictures."""
