"""The decoder family, in Flax."""
