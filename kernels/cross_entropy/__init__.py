"""The loss of a linear head without its logits."""
