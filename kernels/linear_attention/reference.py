"""Linear attention as the formula says it; holds every pair of tokens."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


def linear_attention_reference(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B T K H"],
  v: Float[Array, "B T K H"],
  *,
  log_decay: Float[Array, "B K T"] | None,
  runs: Int[Array, "B T"],
  memory: Float[Array, "B K H H"],
  scale: float,
) -> tuple[Float[Array, "B T N H"], Float[Array, "B K H H"]]:
  """The output, and the memory behind the last token; see `api`.

  Args:
    q: Queries.
    k: Keys.
    v: Values.
    log_decay: Of what was before each token.
    runs: As `weights.number_runs` gives them.
    memory: Of what came before, of run 0.
    scale: Factor on the output.
  """
  B, T, N, H = q.shape
  K = k.shape[2]
  wide = memory.dtype
  if log_decay is None:
    log_decay = jnp.zeros((B, K, T), wide)
  q_BTKGH = q.reshape(B, T, K, N // K, H).astype(wide)
  k, v = k.astype(wide), v.astype(wide)
  order = jnp.arange(T)
  real = runs >= 0
  same = (runs[:, :, None] == runs[:, None]) & real[:, None]
  distance = (order[:, None] - order[None])[None]
  same = (same & (distance >= 0))[:, None]
  # Entry (t, s) is the sum over s < r <= t.
  spans = jnp.cumsum(
    jnp.where(distance[:, None] > 0, log_decay[..., None], 0), axis=2
  )
  weights = jnp.exp(jnp.where(same, spans, -jnp.inf))
  scores = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k) * weights[:, :, None]
  o = jnp.einsum("BKGTS,BSKE->BTKGE", scores, v)

  seen = ((runs == 0) & real)[:, None]
  reach = jnp.exp(jnp.where(seen, jnp.cumsum(log_decay, axis=2), -jnp.inf))
  o += jnp.einsum("BTKGH,BKHE,BKT->BTKGE", q_BTKGH, memory, reach)
  end = jnp.einsum("BSKH,BSKE,BKS->BKHE", k, v, weights[:, :, -1])
  end += reach[:, :, -1, None, None] * memory
  return (scale * o).reshape(B, T, N, H).astype(q.dtype), end
