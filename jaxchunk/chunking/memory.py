"""What a token of a sequence costs in memory, by formula.

`benchmarks/memory.py` and the tests hold these against the compiler's account.
"""

from typing import Literal

import jax.numpy as jnp

from jaxchunk.models.config import ModelConfig

Strategy = Literal["chunk_outer", "layer_outer"]
# Where something that training keeps is.
MemorySpace = Literal["device", "host"]
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
  and the MLP's gate and up (`keep="all"`), those of a token's experts too, and
  the router's logits.
  """
  item = jnp.dtype(cfg.dtype).itemsize
  heads = cfg.num_heads * cfg.head_width
  kept = item * (2 * cfg.d_model + 2 * heads + 2 * cfg.active_width)
  if cfg.moe is not None:
    wide = jnp.promote_types(cfg.dtype, jnp.float32)
    kept += wide.itemsize * cfg.moe.num_experts
  return cfg.num_layers * kept


def working_bytes_per_token(cfg: ModelConfig) -> int:
  """Bytes per token of the one layer whose backward pass is running.

  Queries, keys and values, the MLP's gate, up and hidden, each with their
  cotangents, and what passes between the layer's norms, products and
  residuals; of experts also the sorted copies of a token and their outputs,
  each with its cotangent. The factors are what XLA was seen to hold, but for
  those of experts, which are counted; the compiled figure differs by what it
  finds to share, and on CPU, without ragged products, by a factor of the
  number of experts.
  """
  item = jnp.dtype(cfg.dtype).itemsize
  heads, keys = cfg.num_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
  copies = 0 if cfg.moe is None else cfg.moe.experts_per_token
  width = 11 + 4 * copies
  return item * (
    4 * heads + 4 * keys + 6 * cfg.active_width + width * cfg.d_model
  )


def remat_bytes_per_token(cfg: ModelConfig) -> int:
  """Bytes per token of a whole row that keeps only the layers' inputs."""
  item = jnp.dtype(cfg.dtype).itemsize
  return item * cfg.num_layers * cfg.d_model + working_bytes_per_token(cfg)


def chunk_bytes(cfg: ModelConfig, chunk_size: int, live_chunks: int = 1) -> int:
  """Bytes that chunk-outer needs whatever the length of a lane.

  What the live chunks keep (without any, one chunk at a time keeps it all the
  same) and the layer at work on one chunk.
  """
  kept = max(live_chunks, 1) * activation_bytes_per_token(cfg)
  return chunk_size * (kept + working_bytes_per_token(cfg))


def break_even_length(
  cfg: ModelConfig, chunk_size: int, live_chunks: int = 1
) -> float | None:
  """Length in tokens from which chunk-outer needs less than per-layer remat.

  `None` if the sequence state of a token takes more than its remat.
  """
  state = state_bytes_per_token(cfg, "chunk_outer")
  saved = remat_bytes_per_token(cfg) - state
  if saved <= 0:
    return None
  return chunk_bytes(cfg, chunk_size, live_chunks) / saved


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
  live = min(live_chunks, -(-max(lengths) // chunk_size))
  constant = chunk_bytes(cfg, chunk_size, live)
  ways: dict[str, list[float]] = {}
  for strategy in STRATEGIES:
    slope = state_bytes_per_token(cfg, strategy)
    name = f"by chunks, {strategy.replace('_', '-')}"
    ways[name] = [float(constant + slope * n) for n in lengths]
  row = remat_bytes_per_token(cfg)
  ways["whole sequence, per-layer remat"] = [float(row * n) for n in lengths]
  return ways
