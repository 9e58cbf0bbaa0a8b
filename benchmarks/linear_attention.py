"""Linear attention by chunks beside its quadratic form and softmax attention.

  python benchmarks/linear_attention.py [--longest=8192]

Time and compiled temporary memory, forward and forward with backward, in fp32
at growing lengths: `linear_attention` with a decay for each token and without
any, its reference, which holds every pair of tokens, and causal `attention`.
Contestants take turns in one process; what is compared is the ratio. Numerics
come first: the error of each form of the op against fp64 at 1,024 tokens.

Prints one JSON line.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from common import best_seconds, report, rounded

import jaxchunk as jc

_LONGEST = flags.DEFINE_integer("longest", 8192, "Tokens.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns.")

_HEADS, _WIDTH = 4, 64
# Tokens up to which the reference is run; beyond it is only compiled.
_QUADRATIC = 4096


def draw(length: int, dtype: str = "float32") -> list[jax.Array]:
  rng = np.random.default_rng(0)
  shape = (1, length, _HEADS, _WIDTH)
  tokens = [jnp.asarray(rng.standard_normal(shape), dtype) for _ in range(4)]
  decay = -rng.exponential(0.05, shape[:3])
  return [*tokens[:3], jnp.asarray(decay, dtype), tokens[3]]


def linear(q: Any, k: Any, v: Any, decay: Any, **options: Any) -> jax.Array:
  return jc.linear_attention(q, k, v, log_decay=decay, **options)


def undecayed(q: Any, k: Any, v: Any, decay: Any) -> jax.Array:
  return jc.linear_attention(q, k, v, implementation="xla")


def softmax(q: Any, k: Any, v: Any, decay: Any) -> jax.Array:
  mask = jc.AttentionMask.causal()
  return jc.attention(q, k, v, mask=mask, implementation="xla")


CONTESTANTS: dict[str, Callable[..., jax.Array]] = {
  "linear": functools.partial(linear, implementation="xla"),
  "linear, no decay": undecayed,
  "reference": functools.partial(linear, implementation="reference"),
  "attention": softmax,
}


def passes(op: Callable[..., jax.Array], backward: bool) -> Callable[..., Any]:
  def both(*arguments: Any) -> Any:
    *inputs, do = arguments
    o, vjp = jax.vjp(op, *inputs)
    return o, vjp(do)

  return both if backward else lambda *arguments: op(*arguments[:-1])


def measure(length: int, backward: bool) -> dict[str, dict[str, float]]:
  arguments = draw(length)
  programs = {
    name: jax.jit(passes(op, backward)).lower(*arguments).compile()
    for name, op in CONTESTANTS.items()
  }
  seconds = best_seconds(
    {
      name: lambda program=program: jax.block_until_ready(program(*arguments))
      for name, program in programs.items()
      if name != "reference" or length <= _QUADRATIC
    },
    _ROUNDS.value,
  )
  memory = {
    name: program.memory_analysis().temp_size_in_bytes / 2**20
    for name, program in programs.items()
  }
  return {"seconds": seconds, "temporary_mib": memory}


def errors() -> dict[str, float]:
  """Norm-relative, of the output and all gradients together, of fp32."""

  def flat(name: str, arguments: list[jax.Array]) -> np.ndarray:
    results = jax.jit(passes(CONTESTANTS[name], True))(*arguments)
    leaves = [np.ravel(a) for a in jax.tree.leaves(results)]
    return np.concatenate(leaves).astype(np.float64)

  arguments = draw(1024)
  got = {name: flat(name, arguments) for name in ("linear", "reference")}
  with jax.enable_x64(True):
    truth = flat("reference", [a.astype("float64") for a in arguments])
  size = np.linalg.norm(truth)
  return {n: float(np.linalg.norm(a - truth) / size) for n, a in got.items()}


def main(_: list[str]) -> None:
  figures: dict[str, Any] = {}
  length = 1024
  while length <= _LONGEST.value:
    for backward in (False, True):
      found = measure(length, backward)
      ours = {kind: values["linear"] for kind, values in found.items()}
      figures[f"{length} {'both' if backward else 'forward'}"] = {
        **{kind: values["linear"] for kind, values in found.items()},
        "times_of_linear": {
          kind: {n: v / ours[kind] for n, v in values.items() if n != "linear"}
          for kind, values in found.items()
        },
      }
    length *= 2
  report(
    "linear_attention",
    heads=_HEADS,
    width=_WIDTH,
    error_fp32=rounded(errors()),
    lengths=rounded(figures, 3),
  )


if __name__ == "__main__":
  app.run(main)
