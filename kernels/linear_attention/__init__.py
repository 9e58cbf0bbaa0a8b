"""Linear attention with decay, and its state."""
