"""The TPU kernels of cross-entropy."""
