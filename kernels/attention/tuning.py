"""Times candidates of block sizes, and writes the fastest into tables.py."""

import dataclasses
import functools
import itertools
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp

from jaxchunk.kernels.attention import tables
from jaxchunk.kernels.attention.backends import passes
from jaxchunk.kernels.attention.block_sizes import (
  BlockSizes,
  GpuBlocks,
  TpuBlocks,
  device_kind,
  look_up,
)
from jaxchunk.kernels.attention.mask import AttentionMask

# Shows how far a loop is: takes what is looped over, and a name.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]

_TABLES = {"xla": "XLA", "pallas_tpu": "TPU", "pallas_gpu": "GPU"}
_DEFAULTS: dict[str, Any] = {
  "xla": BlockSizes(),
  "pallas_tpu": TpuBlocks(),
  "pallas_gpu": GpuBlocks(),
}
# What is tried: fields that act on one kernel together.
_CANDIDATES: dict[str, list[dict[str, tuple[int, ...]]]] = {
  "xla": [
    {"q": (256, 512, 1024), "kv": (256, 512, 1024)},
    {"q_bwd": (256, 512, 1024), "kv_bwd": (256, 512, 1024)},
  ],
  "pallas_tpu": [
    {"q": (256, 512, 1024, 2048), "kv": (256, 512, 1024, 2048)},
    {"q_bwd": (256, 512, 1024, 2048), "kv_bwd": (256, 512, 1024)},
  ],
  "pallas_gpu": [
    {"kv": (64, 128, 256), "stages": (2, 3, 4)},
    {"kv_dq": (64, 128), "stages_dq": (1, 2, 3, 4)},
    {"q_dkv": (64,), "stages_dkv": (1, 2, 3, 4)},
  ],
}


@dataclasses.dataclass(frozen=True)
class Problem:
  """What is timed: causal attention of T queries behind a prefix.

  Attributes:
    backend: Its name.
    width: H.
    queries: T.
    prefix: Keys before the queries.
    heads: K.
    group: G.
  """

  backend: str
  width: int
  queries: int
  prefix: int = 0
  heads: int = 4
  group: int = 2

  @property
  def key(self) -> tuple[str, int]:
    """Where the table has its sizes; for TPU the width is in whole lanes."""
    tpu = self.backend == "pallas_tpu"
    return device_kind(), -(-self.width // 128) * 128 if tpu else self.width

  def inputs(self) -> tuple[jax.Array, jax.Array, AttentionMask]:
    """Queries, keys and mask; fp32 on CPU and bf16 elsewhere."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    T, S = self.queries, self.prefix + self.queries
    shapes = (
      (1, self.heads, self.group, T, self.width),
      (1, 1, self.heads, S, self.width),
    )
    keys = jax.random.split(jax.random.key(0), 2)
    q, k = map(functools.partial(jax.random.normal, dtype=dtype), keys, shapes)
    return q, k, AttentionMask.causal(self.prefix)

  def forward(self, blocks: Any) -> Callable[[], Any]:
    """A compiled forward pass."""
    q, k, mask = self.inputs()
    function = functools.partial(
      passes(self.backend).forward, scale=self.width**-0.5, blocks=blocks
    )
    compiled = jax.jit(function).lower(q, k, k, mask).compile()
    return lambda: compiled(q, k, k, mask)

  def backward(self, blocks: Any) -> Callable[[], Any]:
    """A compiled backward pass."""
    q, k, mask = self.inputs()
    o, lse = self.forward(None)()
    function = functools.partial(
      passes(self.backend).backward, scale=self.width**-0.5, blocks=blocks
    )
    wide = jnp.zeros(k.shape, jnp.float32)
    inputs = (q, k, k, mask, o, lse, o, wide, wide)
    compiled = jax.jit(function).lower(*inputs).compile()
    return lambda: compiled(*inputs)


def tune(
  problem: Problem, *, rounds: int, progress: Progress
) -> tuple[Any, dict[str, Any]]:
  """The fastest sizes, and what was measured.

  Args:
    problem: What to time.
    rounds: Turns that the candidates take; the best time of each counts.
    progress: Wraps the loops.

  Returns:
    The sizes, and for each group of fields the chosen values, their time in
    milliseconds, and how many times as fast they are as those of the table.

  Raises:
    RuntimeError: No candidate runs on this device.
  """
  table = getattr(tables, _TABLES[problem.backend])
  now = look_up(table, problem.key[1], _DEFAULTS[problem.backend])
  best, found = now, {}
  for number, group in enumerate(_CANDIDATES[problem.backend]):
    name = " x ".join(group)
    make = problem.forward if number == 0 else problem.backward
    calls = {}
    tried = list(_variants(now, group))
    for blocks in progress(tried, f"compiling {name}"):
      try:
        calls[blocks] = make(blocks)
        jax.block_until_ready(calls[blocks]())
      except Exception as error:  # Too large for the device, say.
        calls.pop(blocks, None)
        reason = error
    if not calls:
      raise RuntimeError(f"no candidate for {name} runs here") from reason
    seconds = dict.fromkeys(calls, float("inf"))
    for _ in progress(range(rounds), f"timing {name}"):
      for blocks, call in calls.items():
        start = time.perf_counter()
        jax.block_until_ready(call())
        seconds[blocks] = min(seconds[blocks], time.perf_counter() - start)
    fastest = min(seconds, key=seconds.__getitem__)
    chosen = {field: getattr(fastest, field) for field in group}
    best = dataclasses.replace(best, **chosen)
    found[name] = chosen | {
      "milliseconds": round(seconds[fastest] * 1e3, 3),
      "candidates": f"{len(calls)} of {len(tried)}",
    }
    if now in seconds:
      found[name]["over_table"] = round(seconds[now] / seconds[fastest], 3)
  return best, found


def _variants(now: Any, group: dict[str, tuple[int, ...]]) -> Iterator[Any]:
  """The sizes of today, and each combination of a group of fields."""
  yield now
  for values in itertools.product(*group.values()):
    changed = dataclasses.replace(now, **dict(zip(group, values, strict=True)))
    if changed != now:
      yield changed


def write_table(
  backend: str, entries: dict[tuple[str, int], Any], path: pathlib.Path
) -> None:
  """Replaces entries of a backend's table.

  Args:
    backend: Its name.
    entries: Sizes by kind of device and head width.
    path: Of tables.py, which keeps its other entries and its comments.
  """
  text = path.read_text()
  start = text.index("= {", text.index(f"\n{_TABLES[backend]}: dict")) + 3
  end = text.index("}", start)
  table = getattr(tables, _TABLES[backend]) | entries
  lines = [""]
  for (kind, width), sizes in sorted(table.items()):
    fields = (f"{f}={v}" for f, v in dataclasses.asdict(sizes).items())
    lines.append(f'  ("{kind}", {width}): {type(sizes).__name__}(')
    lines += ["    " + ", ".join(fields), "  ),"]
  path.write_text(text[:start] + "\n".join([*lines, ""]) + text[end:])
