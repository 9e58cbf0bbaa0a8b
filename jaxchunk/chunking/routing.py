"""How many tokens each expert gets: the first phase of the balance loss.

The loss of a router's balance is over the global batch, so its derivative by a
token's probabilities needs the shares of all experts. A forward pass over all
chunks counts them; the second phase is the ordinary gradient, with the shares
as weights (`jaxchunk.models.moe.RouterWeights`).
"""

from typing import Any

from jax import lax
from jaxtyping import Array, Int, PRNGKeyArray

from jaxchunk.chunking.chunk import Chunk, Lane, chunk_of
from jaxchunk.chunking.ops import Stage
from jaxchunk.chunking.spans import Span, over_layers, put
from jaxchunk.kernels.vma import vary_like
from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer


def has_router_losses(cfg: ModelConfig) -> bool:
  """Whether the loss of a model has parts from its routers."""
  return cfg.moe is not None and cfg.moe.has_losses


def check_no_router_losses(cfg: ModelConfig, used: str) -> None:
  """Refuses what does not go with losses of routers.

  Args:
    cfg: The model.
    used: What does not, "loss=...".

  Raises:
    ValueError: The model has some.
  """
  if has_router_losses(cfg):
    raise ValueError(
      f"{used} does not go with moe={cfg.moe}, whose routers have losses; set "
      "moe.balance_loss=0 and moe.z_loss=0"
    )


def lane_counts(
  stage: Stage,
  model: Transformer,
  lane: Lane,
  num_chunks: Int[Array, ""],
  counts: Int[Array, "L E"],
  rng: PRNGKeyArray | None = None,
) -> Int[Array, "L E"]:
  """Adds the copies that each expert gets of a lane's tokens; forward only.

  Args:
    stage: What runs.
    model: The parameters.
    lane: Tokens; its length is the capacity.
    num_chunks: How many chunks are in use.
    counts: So far.
    rng: Key for dropout, that of the second phase.

  Returns:
    The counts.
  """
  batch, length = lane.tokens.shape

  def body(i: Any, carry: Any) -> Any:
    states, counts = carry
    here = chunk_of(model, lane, i, stage.chunk_size, rng)
    return _chunk_counts(stage, model, here, stage.save(states, i), counts)

  states = stage.init_states(model, batch, length)
  states = vary_like(states, model, lane, num_chunks)
  counts = vary_like(counts, lane, num_chunks)
  return lax.fori_loop(0, num_chunks, body, (states, counts))[1]


def _chunk_counts(
  stage: Stage, model: Transformer, chunk: Chunk, states: Any, counts: Any
) -> Any:
  def layer(position: int, index: Any, carry: Any) -> Any:
    x, states, counts = carry
    block = stage.layer(model, position, index)
    number = index * len(model.blocks) + position
    x, state, saved = stage.forward_block(
      block, x, chunk, position, index, states[position], number
    )
    counts = counts.at[number].add(saved["router"].counts)
    return x, put(states, position, state), counts

  x = vary_like(stage.embed(model, chunk), chunk)
  return over_layers(Span.of(model), layer, (x, states, counts))[1:]
