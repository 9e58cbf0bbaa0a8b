"""The plain reference: whole rows, ordinary autodiff, nothing clever."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PRNGKeyArray

from jaxchunk.chunking.gradient import SequenceLoss
from jaxchunk.chunking.routing import (
  check_no_router_losses,
  has_router_losses,
)
from jaxchunk.chunking.trainable import (
  Subset,
  Trainable,
  check_trainable,
  widened,
)
from jaxchunk.kernels.cross_entropy.api import linear_cross_entropy
from jaxchunk.models.moe import router_loss
from jaxchunk.models.transformer import Transformer
from jaxchunk.types import Batch, check_vocabulary


def full_value_and_grad(
  model: Transformer,
  batch: Batch | Mapping[str, Any],
  *,
  trainable: Any = None,
  loss: SequenceLoss | None = None,
  rng: PRNGKeyArray | None = None,
  implementation: str = "reference",
  remat: bool = False,
) -> tuple[Float[Array, ""], nnx.State]:
  """Loss and gradients of a batch in one piece; the yardstick of exactness.

  Args:
    model: The model.
    batch: Rows of packed sequences; see `jaxchunk.types.Batch`.
    trainable: Which parameters get gradients.
    loss: A function of the sequences' sums; see `chunked_value_and_grad`.
    rng: Key for dropout.
    implementation: "reference" holds every score and logit; "xla" runs
      blockwise attention and a blockwise head, for whole rows that would not
      fit otherwise.
    remat: Keep only the layers' inputs for the backward pass.

  Returns:
    As `chunked_value_and_grad`.

  Raises:
    ValueError: The batch is malformed.
  """
  check_trainable(model, trainable)
  if loss is not None:
    check_no_router_losses(model.cfg, "loss=...")
  batch = Batch.of(batch)
  check_vocabulary(batch.examples(), model.cfg.vocab_size)
  selected = Trainable.of(model, trainable)
  chosen, rebuild = Subset(selected.chosen).split(model)
  chosen = [widened(a) for a in chosen]
  sequence, count = _sequence_numbers(batch)

  def mean_loss(chosen: list[Array]) -> Array:
    nll, own = _token_nll(rebuild(chosen), batch, rng, implementation, remat)
    weights = jnp.asarray(batch.weights).astype(nll.dtype)
    weighted = jnp.where(weights == 0, 0, weights * nll)
    if loss is None:
      return weighted.sum() / weights.sum() + own
    # One more sum collects the padding, and is dropped.
    sums = jnp.zeros((2, count + 1), nll.dtype)
    sums = sums.at[0, sequence].add(weighted).at[1, sequence].add(weights)
    return loss(sums[0, :count], sums[1, :count])

  value, grads = jax.jit(jax.value_and_grad(mean_loss))(chosen)
  return value, selected.state(grads)


def _token_nll(
  model: Transformer,
  batch: Batch,
  rng: PRNGKeyArray | None,
  implementation: str,
  remat: bool,
) -> tuple[Float[Array, "B T"], Any]:
  """Of every token, and the losses of routers."""
  tokens, targets = jnp.asarray(batch.tokens), jnp.asarray(batch.targets)
  h, said = model.hidden_and_routers(
    tokens,
    segment_ids=jnp.asarray(batch.segment_ids),
    positions=jnp.asarray(batch.positions),
    document_ids=jnp.asarray(batch.document_ids),
    rng=rng,
    implementation=implementation,
    remat=remat,
  )
  moe = model.cfg.moe
  own: Any = 0.0
  if moe is not None and said is not None and has_router_losses(model.cfg):
    own = router_loss(moe, said)
  if implementation == "reference":
    log_p = jax.nn.log_softmax(model.logits(h))
    nll = -jnp.take_along_axis(log_p, targets[..., None], axis=-1)[..., 0]
    return nll, own
  softcap = model.cfg.logit_softcap
  nll, _ = linear_cross_entropy(h, model.unembed, targets, softcap=softcap)
  return nll, own


def _sequence_numbers(batch: Batch) -> tuple[np.ndarray, int]:
  """Each token's place in `Batch.examples`, and how many there are.

  Padding gets the number behind the last.
  """
  change = np.diff(batch.segment_ids, axis=1, prepend=-1) != 0
  first = change & (batch.segment_ids > 0)
  numbers = np.cumsum(first).reshape(first.shape) - 1
  count = int(first.sum())
  return np.where(batch.segment_ids > 0, numbers, count), count
