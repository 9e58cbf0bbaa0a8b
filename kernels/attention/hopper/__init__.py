"""The warpgroups of `pallas_gpu`."""
