"""Held-out bits per byte, synthetic long-context tasks, and their pictures."""
