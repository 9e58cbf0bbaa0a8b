"""Block sizes by kind of device ("" is any) and head width.

Written by `scripts/tune_kernels.py --write`, which replaces what it measured.
"""

from jaxchunk.kernels.attention.block_sizes import (
  BlockSizes,
  GpuBlocks,
  TpuBlocks,
)

XLA: dict[tuple[str, int], BlockSizes] = {}

# Widths in whole lanes. From the compiled programs: 512 keys reach 98k flop
# per bundle of instructions on v5e and v5p, more give nothing; on v6e 512 give
# 143k, 1024 give 167k.
TPU: dict[tuple[str, int], TpuBlocks] = {
  ("TPU v6 lite", 128): TpuBlocks(q=1024, kv=1024, q_bwd=1024, kv_bwd=512),
  ("TPU7x", 128): TpuBlocks(q=1024, kv=1024, q_bwd=1024, kv_bwd=512),
}

# What fits into 227 KiB of shared memory and 240 registers; not timed.
GPU: dict[tuple[str, int], GpuBlocks] = {
  ("", 64): GpuBlocks(
    kv=128, stages=4, kv_dq=128, stages_dq=3, q_dkv=64, stages_dkv=4
  ),
  ("", 80): GpuBlocks(
    kv=128, stages=2, kv_dq=64, stages_dq=2, q_dkv=64, stages_dkv=2
  ),
  ("", 96): GpuBlocks(
    kv=128, stages=2, kv_dq=64, stages_dq=2, q_dkv=64, stages_dkv=2
  ),
  ("", 128): GpuBlocks(
    kv=128, stages=2, kv_dq=64, stages_dq=3, q_dkv=64, stages_dkv=3
  ),
  ("", 256): GpuBlocks(
    kv=64, stages=2, kv_dq=64, stages_dq=1, q_dkv=64, stages_dkv=1
  ),
}
