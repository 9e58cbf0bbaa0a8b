"""What a token of a sequence costs in memory, by formula.

`benchmarks/memory.py` and the tests hold these against the compiler's account.
"""

from typing import Literal

import jax.numpy as jnp

from jaxchunk.models.config import ModelConfig

Strategy = Literal["chunk_outer", "layer_outer"]
STRATEGIES: tuple[Strategy, ...] = ("chunk_outer", "layer_outer")


def state_bytes_per_token(
  cfg: ModelConfig, strategy: Strategy, grad_dtype: str | None = None
) -> int:
  """Bytes that each further token of a lane adds to peak memory.

  Chunk-outer: keys, values and their gradients of every layer (window layers
  without gradients, which do not grow). Layer-outer: every layer's input and
  the last one's output, and keys, values and gradients of one layer.

  Args:
    cfg: The model.
    strategy: Which loop is outside.
    grad_dtype: Of the gradients of keys and values.

  Returns:
    Bytes per token.
  """
  item = jnp.dtype(cfg.dtype).itemsize
  wide = jnp.promote_types(cfg.dtype, jnp.float32)
  grad = jnp.dtype(grad_dtype or wide).itemsize
  channels = 2 * cfg.kv_heads * cfg.head_width
  kinds = cfg.window_pattern
  if strategy == "layer_outer":
    full = None in kinds
    inputs = (cfg.num_layers + 1) * cfg.d_model * item
    return inputs + channels * (item + (grad if full else 0))
  return sum(
    cfg.layers_of(n) * channels * (item + (grad if window is None else 0))
    for n, window in enumerate(kinds)
  )


def activation_bytes_per_token(cfg: ModelConfig) -> int:
  """Bytes that a live chunk keeps of each of its tokens, in all layers.

  The layer's input, q, attention's output before and after its projection,
  and the MLP's gate and up (`keep="all"`).
  """
  item = jnp.dtype(cfg.dtype).itemsize
  heads = cfg.num_heads * cfg.head_width
  return item * cfg.num_layers * (2 * cfg.d_model + 2 * heads + 2 * cfg.d_ff)


def remat_bytes_per_token(cfg: ModelConfig) -> int:
  """Bytes per token of a whole row that keeps only the layers' inputs.

  Besides those inputs, the layer at work in the backward pass holds its norms'
  outputs, queries, keys, values and attention's output with their cotangents,
  and the MLP's gate, up and hidden with theirs.
  """
  item = jnp.dtype(cfg.dtype).itemsize
  heads, keys = cfg.num_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
  layer = 4 * heads + 4 * keys + 5 * cfg.d_ff + 3 * cfg.d_model
  return item * (cfg.num_layers * cfg.d_model + layer)


def memory_by_length(
  cfg: ModelConfig, lengths: list[int], *, chunk_size: int, live_chunks: int = 1
) -> dict[str, list[float]]:
  """Predicted bytes besides parameters, for each way to train and length.

  Args:
    cfg: The model.
    lengths: In tokens.
    chunk_size: C.
    live_chunks: K.

  Returns:
    For each way a list of bytes, one per length.
  """
  tokens = min(max(live_chunks, 1) * chunk_size, max(lengths))
  constant = tokens * activation_bytes_per_token(cfg)
  ways: dict[str, list[float]] = {}
  for strategy in STRATEGIES:
    slope = state_bytes_per_token(cfg, strategy)
    name = f"by chunks, {strategy.replace('_', '-')}"
    ways[name] = [float(constant + slope * n) for n in lengths]
  row = remat_bytes_per_token(cfg)
  ways["whole sequence, per-layer remat"] = [float(row * n) for n in lengths]
  return ways
