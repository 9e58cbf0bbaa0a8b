"""The GPU kernel of cross-entropy."""
