"""Attention on CPU beside torch's, at one length, in fp32.

  python benchmarks/attention_cpu.py [--length=4096]

Forward, and forward with backward, of causal attention with 8 heads of 64;
torch at the better of one and two threads. Times are the best of turns taken
in one run.
"""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import app, flags
from common import best_seconds, report, rounded

import jaxchunk as jc

_LENGTH = flags.DEFINE_integer("length", 4096, "S, tokens.")
_ROUNDS = flags.DEFINE_integer("rounds", 8, "Turns.")


def main(_: list[str]) -> None:
  rng = np.random.default_rng(0)
  shape = (1, _LENGTH.value, 8, 64)
  arrays = [rng.standard_normal(shape).astype(np.float32) for _ in range(3)]
  q, k, v = map(jnp.asarray, arrays)
  mask = jc.AttentionMask.causal()

  def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    return jc.attention(q, k, v, mask=mask)

  forward = jax.jit(attend)
  both = jax.jit(
    jax.value_and_grad(lambda *x: attend(*x).sum(), argnums=(0, 1, 2))
  )
  peers = [
    torch.tensor(a.transpose(0, 2, 1, 3).copy(), requires_grad=True)
    for a in arrays
  ]
  sdpa = torch.nn.functional.scaled_dot_product_attention

  def torch_forward(threads: int) -> None:
    torch.set_num_threads(threads)
    with torch.no_grad():
      sdpa(*peers, is_causal=True)

  def torch_both(threads: int) -> None:
    torch.set_num_threads(threads)
    sdpa(*peers, is_causal=True).sum().backward()
    for peer in peers:
      peer.grad = None

  runs = {
    "jaxchunk forward": lambda: jax.block_until_ready(forward(q, k, v)),
    "jaxchunk both": lambda: jax.block_until_ready(both(q, k, v)),
  }
  for threads in (1, 2):
    runs[f"torch forward {threads}"] = lambda n=threads: torch_forward(n)
    runs[f"torch both {threads}"] = lambda n=threads: torch_both(n)
  best = best_seconds(runs, _ROUNDS.value)
  ratio = {
    kind: min(best[f"torch {kind} {n}"] for n in (1, 2))
    / best[f"jaxchunk {kind}"]
    for kind in ("forward", "both")
  }
  report(
    "attention_cpu",
    length=_LENGTH.value,
    milliseconds=rounded({n: t * 1e3 for n, t in best.items()}),
    speed_over_torch=rounded(ratio),
    torch=torch.__version__,
    ok=min(ratio.values()) >= 1,
  )


if __name__ == "__main__":
  app.run(main)
