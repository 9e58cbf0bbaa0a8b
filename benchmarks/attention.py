"""Attention beside its peers: time, rate, memory, and a roofline.

  python benchmarks/attention.py [--forms=causal,prefix,sparse] [--record]

Causal attention at growing lengths; the prefix form that chunks need (a block
of queries behind a long prefix); and causal attention under block tables of
falling density. Forward, and forward with backward. The contestants: jaxchunk
("xla", and the Pallas kernels where there is a Hopper GPU or a TPU), `jax.nn`
(xla, cudnn), JAX's own Pallas operations, tokamax, torch's SDPA (on CPU with
one thread and all, waiting actively and passively) and FlexAttention. Each is
a process of its own; they take turns, and the best time of each counts. What is
not installed, cannot express a form or runs out of memory is listed with the
reason.

Numerics come first: jaxchunk's error against fp64 on fresh random inputs,
beside the error of the plain computation in the same dtype.

Prints one JSON line. `--record` also writes it, with device and versions, and
a picture into benchmarks/results/.
"""

import dataclasses
import functools
import json
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from absl import app, flags
from common import record, report, rounded, run_contestant, torch_settings

_FORMS = flags.DEFINE_list("forms", ["causal", "prefix", "sparse"], "Forms.")
_DTYPES = flags.DEFINE_list("dtypes", [], "By default fp32 and bf16 on CPU.")
_LONGEST = flags.DEFINE_integer("longest", 0, "S; by default by the device.")
_ROUNDS = flags.DEFINE_integer("rounds", 2, "Turns.")
_SEED = flags.DEFINE_integer("seed", 0, "Of the inputs.")
_ONLY = flags.DEFINE_list("only", [], "Contestants, if not all.")
_RECORD = flags.DEFINE_bool("record", False, "Write benchmarks/results/.")
_RUN = flags.DEFINE_string("run", None, "For the benchmark's own processes.")

# Queries of the prefix form, and tokens of a block of a table.
_QUERIES, _BLOCK = 2048, 256
_DENSITIES = (1.0, 1 / 2, 1 / 4, 1 / 8, 1 / 16)
# Scores that a peer may hold at once, in bytes.
_MOST_SCORES = 8 << 30
# Peak of dense bf16 products, and of memory, of known devices.
_PEAKS = {"NVIDIA H200": (989e12, 4.8e12), "TPU v5 lite": (197e12, 0.82e12)}


@dataclasses.dataclass(frozen=True)
class Case:
  """One attention: T queries, the last of S tokens, of N heads on K."""

  form: str
  dtype: str
  T: int
  S: int
  N: int
  K: int
  H: int
  backward: bool
  density: float = 1.0

  @property
  def key(self) -> str:
    """A name in the results."""
    kind = "both" if self.backward else "forward"
    share = f" 1/{round(1 / self.density)}" if self.form == "sparse" else ""
    return f"{self.form}{share} {self.dtype} {self.T}x{self.S} {kind}"

  @property
  def pairs(self) -> float:
    """Visible pairs of a query and a key, of all heads."""
    causal = self.T * (self.S - self.T) + self.T * (self.T + 1) / 2
    if self.form == "sparse":
      chosen = table(self)
      causal = (chosen >= 0).sum() * _BLOCK**2 - self.T * (_BLOCK - 1) / 2
    return self.N * float(causal)

  @property
  def flops(self) -> float:
    """Of the products: 2 forward, 5 backward."""
    return self.pairs * self.H * (14 if self.backward else 4)

  @property
  def least_bytes(self) -> float:
    """Inputs and outputs, once."""
    size = 2 if self.dtype == "bfloat16" else 4
    tokens = 2 * self.N * self.T + 2 * self.K * self.S
    return size * self.H * tokens * (3 if self.backward else 1)


@functools.lru_cache
def table(case: Case) -> np.ndarray:
  """Blocks of each block of queries: its own and random ones, -1 behind."""
  rng = np.random.default_rng(_SEED.value)
  blocks = case.S // _BLOCK
  rows = np.full((blocks, blocks), -1, np.int32)
  for i in range(blocks):
    count = max(1, round(case.density * (i + 1)))
    rows[i, :count] = [i, *rng.permutation(i)[: count - 1]]
  most = (rows >= 0).sum(1).max()
  return rows[:, :most]


def doubling(first: int, last: int) -> Iterator[int]:
  """Powers of two times the first, up to the last."""
  while first <= last:
    yield first
    first *= 2


def cases(platform: str) -> Iterator[Case]:
  """What is measured, by the platform."""
  cpu = platform == "cpu"
  N, K, H = (8, 8, 64) if cpu else (16, 4, 128)
  longest = _LONGEST.value or (8192 if cpu else 131072)
  dtypes = _DTYPES.value or (["float32", "bfloat16"] if cpu else ["bfloat16"])
  for dtype in dtypes:
    for backward in (False, True):
      make = functools.partial(
        Case, dtype=dtype, N=N, K=K, H=H, backward=backward
      )
      if "causal" in _FORMS.value:
        for S in doubling(1024, longest):
          yield make("causal", T=S, S=S)
      if "prefix" in _FORMS.value:
        for S in doubling(8192, longest * (2 if cpu else 4)):
          yield make("prefix", T=_QUERIES, S=S)
      if "sparse" in _FORMS.value:
        S = min(longest, 8192 if cpu else 32768)
        for density in _DENSITIES:
          yield make("sparse", T=S, S=S, density=density)


def draw(case: Case) -> list[np.ndarray]:
  """q, k, v and the cotangent, `[1,T,N,H]` or `[1,S,K,H]`."""
  rng = np.random.default_rng(_SEED.value)
  shapes = [(case.T, case.N), (case.S, case.K), (case.S, case.K)]
  shapes.append(shapes[0])
  return [
    rng.standard_normal((1, *shape, case.H), dtype=np.float32)
    for shape in shapes
  ]


# How a contestant prepares a case: a function of q, k, v for JAX.
Attend = Callable[..., Any]


def ours(implementation: str, case: Case) -> Attend:
  """The public operation of this library."""
  import jax.numpy as jnp

  import jaxchunk as jc

  mask = jc.AttentionMask.causal(case.S - case.T)
  if case.form == "sparse":
    rows = jnp.asarray(table(case))
    rows = jnp.broadcast_to(rows, (1, case.K, *rows.shape))
    mask &= jc.AttentionMask.blocks(rows, q_block=_BLOCK, kv_block=_BLOCK)
  return functools.partial(
    jc.attention, mask=mask, implementation=implementation
  )


def plain(case: Case) -> Attend:
  """The formula, every product in the inputs' dtype: errors' yardstick."""
  import jax
  import jax.numpy as jnp

  t = jnp.arange(case.T)[:, None] + case.S - case.T
  seen = jnp.arange(case.S)[None] <= t
  if case.form == "sparse":
    blocks = np.zeros((case.S // _BLOCK,) * 2, bool)
    for i, row in enumerate(table(case)):
      blocks[i, row[row >= 0]] = True
    seen &= blocks.repeat(_BLOCK, 0).repeat(_BLOCK, 1)

  def attend(q: Any, k: Any, v: Any) -> Any:
    k, v = (a.repeat(case.N // case.K, axis=2) for a in (k, v))
    s = jnp.einsum("BTNH,BSNH->BNTS", q * case.H**-0.5, k)
    p = jax.nn.softmax(jnp.where(seen, s, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", p, v)

  return attend


def jax_nn(implementation: str, case: Case) -> Attend:
  """`jax.nn.dot_product_attention`."""
  import jax
  import jax.numpy as jnp

  if case.form == "sparse":
    raise NotImplementedError("has no block tables")
  if implementation == "xla" and 8 * case.N * case.T * case.S > _MOST_SCORES:
    raise NotImplementedError("holds every score: too many")
  function = functools.partial(
    jax.nn.dot_product_attention, implementation=implementation
  )
  if case.T == case.S:
    return functools.partial(function, is_causal=True)
  p = jnp.arange(case.T)[:, None] + case.S - case.T
  seen = jnp.arange(case.S)[None] <= p
  return functools.partial(function, mask=seen[None, None])


def jax_pallas(case: Case) -> Attend:
  """JAX's own Pallas operation for the device."""
  import jax

  if case.form != "causal":
    raise NotImplementedError("causal and square only")
  if jax.default_backend() == "gpu":
    from jax.experimental.pallas.ops.gpu import attention_mgpu

    if case.backward:
      raise NotImplementedError("no causal backward pass")
    config = attention_mgpu.TuningConfig(
      block_q=64, block_kv=128, max_concurrent_steps=2, causal=True
    )
    scale = case.H**-0.5
    return lambda q, k, v: attention_mgpu.attention(q * scale, k, v, config)
  if jax.default_backend() != "tpu":
    raise NotImplementedError("for GPU and TPU")
  from jax.experimental.pallas.ops.tpu import flash_attention

  def attend(q: Any, k: Any, v: Any) -> Any:
    group = case.N // case.K
    k, v = (a.repeat(group, axis=2) for a in (k, v))
    q, k, v = (a.swapaxes(1, 2) for a in (q, k, v))
    return flash_attention.flash_attention(
      q, k, v, causal=True, sm_scale=case.H**-0.5
    ).swapaxes(1, 2)

  return attend


def tokamax(case: Case) -> Attend:
  """tokamax, with the implementation that it chooses."""
  import tokamax as library

  if case.form != "causal":
    raise NotImplementedError("causal and square only")
  return functools.partial(library.dot_product_attention, is_causal=True)


JAX_CONTESTANTS: dict[str, Callable[[Case], Attend]] = {
  "jaxchunk xla": functools.partial(ours, "xla"),
  "jaxchunk pallas_gpu": functools.partial(ours, "pallas_gpu"),
  "jaxchunk pallas_tpu": functools.partial(ours, "pallas_tpu"),
  "jax.nn xla": functools.partial(jax_nn, "xla"),
  "jax.nn cudnn": functools.partial(jax_nn, "cudnn"),
  "jax pallas": jax_pallas,
  "tokamax": tokamax,
}


def contestants(platform: str) -> list[str]:
  """Names for a platform: for torch on CPU with threads and waiting policy."""
  if platform == "cpu":
    names = ["jaxchunk xla", "jax.nn xla"]
    names += [f"torch sdpa {n} {policy}" for n, policy in torch_settings()]
  else:
    names = [f"jaxchunk pallas_{platform}", "jaxchunk xla", "jax.nn xla"]
    names += ["jax.nn cudnn"] if platform == "gpu" else []
    names += ["jax pallas", "tokamax"]
    names += ["torch sdpa", "torch flex"] if platform == "gpu" else []
  return [n for n in names if not _ONLY.value or n in _ONLY.value]


def prepare_jax(name: str, case: Case) -> tuple[Callable[[], Any], int]:
  """A call that returns when it is enqueued, and its bytes."""
  import jax
  import jax.numpy as jnp

  attend = JAX_CONTESTANTS[name](case)
  q, k, v, do = (jnp.asarray(a, case.dtype) for a in draw(case))

  def both(q: Any, k: Any, v: Any, do: Any) -> Any:
    o, vjp = jax.vjp(attend, q, k, v)
    return o, vjp(do)

  function = both if case.backward else lambda q, k, v, do: attend(q, k, v)
  compiled = jax.jit(function).lower(q, k, v, do).compile()
  memory = compiled.memory_analysis().temp_size_in_bytes
  return lambda: compiled(q, k, v, do), memory


def prepare_torch(name: str, case: Case) -> tuple[Callable[[], Any], int]:
  """As `prepare_jax`; on CPU torch does not tell its memory."""
  import torch

  cuda = torch.cuda.is_available()
  words = name.split()
  if not cuda:
    torch.set_num_threads(int(words[2]))
  q, k, v, do = (
    torch.tensor(a, dtype=getattr(torch, case.dtype))
    .transpose(1, 2)
    .contiguous()
    .to("cuda" if cuda else "cpu")
    .requires_grad_(case.backward)
    for a in draw(case)
  )
  attend = torch_flex(case) if words[1] == "flex" else torch_sdpa(case)

  def call() -> Any:
    o = attend(q, k, v)
    return torch.autograd.grad(o, (q, k, v), do) if case.backward else o

  if not cuda:
    return call, 0
  call()
  torch.cuda.reset_peak_memory_stats()
  before = torch.cuda.memory_allocated()
  results = call()
  if not isinstance(results, tuple):
    results = (results,)
  outputs = sum(a.numel() * a.element_size() for a in results)
  return call, torch.cuda.max_memory_allocated() - before - outputs


def torch_sdpa(case: Case) -> Attend:
  """What torch chooses by itself."""
  import torch

  if case.form == "sparse":
    raise NotImplementedError("has no block tables")
  options: dict[str, Any] = {"enable_gqa": case.N != case.K}
  if case.T == case.S:
    options["is_causal"] = True
  elif torch.cuda.is_available():
    from torch.nn.attention.bias import causal_lower_right

    options["attn_mask"] = causal_lower_right(case.T, case.S)
  else:
    seen = torch.ones(case.T, case.S, dtype=torch.bool)
    options["attn_mask"] = seen.tril(case.S - case.T)
  sdpa = torch.nn.functional.scaled_dot_product_attention
  return functools.partial(sdpa, **options)


def torch_flex(case: Case) -> Attend:
  """FlexAttention, compiled, with its own masks of blocks."""
  import torch
  from torch.nn.attention.flex_attention import BlockMask, flex_attention
  from torch.nn.attention.flex_attention import create_block_mask as create

  # Each case has its own shapes: without this the compiler gives up on them.
  torch._dynamo.reset()
  offset = case.S - case.T

  def causal(b: Any, h: Any, t: Any, s: Any) -> Any:
    return t + offset >= s

  if case.form == "sparse":
    rows = np.sort(table(case)[:, ::-1], axis=1)[:, ::-1].copy()
    count = (rows >= 0).sum(1).astype(np.int32)
    wide = np.zeros((len(rows), len(rows)), np.int32)
    wide[:, : rows.shape[1]] = np.maximum(rows, 0)
    blocks = BlockMask.from_kv_blocks(
      torch.tensor(count)[None, None].cuda(),
      torch.tensor(wide)[None, None].cuda(),
      BLOCK_SIZE=_BLOCK,
      mask_mod=causal,
    )
  else:
    blocks = create(
      causal, None, None, case.T, case.S, device="cuda", _compile=True
    )
  return functools.partial(
    torch.compile(flex_attention, dynamic=False),
    block_mask=blocks,
    enable_gqa=case.N != case.K,
  )


def seconds_of(
  call: Callable[[], Any], wait: Callable[[Any], Any], platform: str
) -> float:
  """Of one call; on an accelerator many are enqueued where one is short."""
  wait(call())
  start = time.perf_counter()
  wait(call())
  once = time.perf_counter() - start
  times = [once]
  # On CPU calls that do not wait for each other might run side by side.
  most = 1 if platform == "cpu" else 100
  count = max(1, min(most, int(0.1 / max(once, 1e-6))))
  for _ in range(3):
    start = time.perf_counter()
    for _ in range(count):
      result = call()
    wait(result)
    times.append((time.perf_counter() - start) / count)
  return min(times)


def worker(name: str, platform: str) -> None:
  """Times one contestant on every case; a JSON line for each."""
  if name.startswith("torch"):
    import torch

    prepare: Any = prepare_torch
    cuda = torch.cuda.is_available()
    wait = (lambda _: torch.cuda.synchronize()) if cuda else (lambda _: None)
  else:
    import jax

    if jax.default_backend() != platform:
      raise RuntimeError(f"jax runs on {jax.default_backend()}, not {platform}")
    prepare, wait = prepare_jax, jax.block_until_ready
  for case in cases(platform):
    line: dict[str, Any] = {"case": case.key}
    try:
      call, memory = prepare(name, case)
      line |= {"seconds": seconds_of(call, wait, platform), "bytes": memory}
    except Exception as error:  # Reported, with its kind, beside the figures.
      text = str(error).strip().splitlines() or [""]
      line["skipped"] = f"{type(error).__name__}: {text[0][:160]}"
    print(json.dumps(line), flush=True)


def measure(name: str, platform: str) -> list[dict[str, Any]]:
  """Runs a contestant's process."""
  policy = name.split()[-1] if name.startswith("torch sdpa ") else "passive"
  own = [f for f in sys.argv[1:] if not f.startswith("--record")]
  lines, code = run_contestant(
    [__file__, *own, f"--run={platform}:{name}"], policy
  )
  if code:
    lines.append({"case": "all", "skipped": f"exit code {code}"})
  return lines


def outputs(attend: Attend, dtype: Any, arrays: list[Any]) -> list[np.ndarray]:
  """Output and gradients, as fp64."""
  import jax

  q, k, v, do = (a.astype(dtype) for a in arrays)

  def both(q: Any, k: Any, v: Any, do: Any) -> Any:
    o, vjp = jax.vjp(attend, q, k, v)
    return o, *vjp(do)

  return [np.asarray(a, np.float64) for a in jax.jit(both)(q, k, v, do)]


def numerics(platform: str) -> dict[str, float]:
  """Worst error over that of the plain computation in the same dtype.

  Both against fp64, relative to the largest value, for outputs and gradients
  of causal, prefix and sparse attention. Above 2 is wrong.
  """
  import jax
  import jax.numpy as jnp

  name = "xla" if platform == "cpu" else f"pallas_{platform}"
  H = 64 if platform == "cpu" else 128
  worst: dict[str, float] = {}
  for form, T, S in (
    ("causal", 1024, 1024),
    ("prefix", 256, 2048),
    ("sparse", 1024, 1024),
  ):
    case = Case(form, "bfloat16", T, S, 4, 2, H, True, 0.5)
    arrays = [jnp.asarray(a, case.dtype) for a in draw(case)]
    got = outputs(ours(name, case), case.dtype, arrays)
    same_dtype = outputs(plain(case), case.dtype, arrays)
    host = jax.devices("cpu")[0]
    with jax.enable_x64(True), jax.default_device(host):
      arrays = [jax.device_put(a, host) for a in arrays]
      true = outputs(plain(case), jnp.float64, arrays)
    parts = ("o", "dq", "dk", "dv")
    for part, a, b, c in zip(parts, got, same_dtype, true, strict=True):
      ratio = np.abs(a - c).max() / np.abs(b - c).max()
      # Not `max`: a NaN must stay.
      worst[part] = float(np.maximum(worst.get(part, 0.0), ratio))
  return worst


def checks(
  seconds: dict[str, dict[str, float]],
  memory: dict[str, dict[str, int]],
  platform: str,
) -> dict[str, Any]:
  """The figures that are promised, from those measured.

  Speed over the fastest peer; block-sparse time over density times dense; and
  the forward pass's temporary bytes by length, which should not grow.
  """
  mine = "jaxchunk xla" if platform == "cpu" else f"jaxchunk pallas_{platform}"
  own, temporary = seconds.get(mine, {}), memory.get(mine, {})
  over_peer: dict[str, float] = {}
  over_dense: dict[str, float] = {}
  forward: dict[str, int] = {}
  for case in cases(platform):
    if case.key not in own:
      continue
    peers = [
      times[case.key]
      for name, times in seconds.items()
      if not name.startswith("jaxchunk") and case.key in times
    ]
    if peers:
      over_peer[case.key] = min(peers) / own[case.key]
    dense = dataclasses.replace(case, form="causal", density=1.0)
    if case.form == "sparse" and dense.key in own:
      share = case.pairs / dense.pairs
      over_dense[case.key] = own[case.key] / (share * own[dense.key])
    if case.form == "causal" and not case.backward:
      forward[case.key] = temporary[case.key]
  return {
    "over_fastest_peer": over_peer,
    "sparse_over_density_x_dense": over_dense,
    "forward_temporary_bytes": forward,
  }


def draw_roofline(
  path: pathlib.Path,
  results: dict[str, dict[str, float]],
  platform: str,
  device: str,
) -> None:
  """Rates of all cases against the flops that each byte allows."""
  import matplotlib.figure

  figure = matplotlib.figure.Figure(figsize=(9, 6), layout="constrained")
  axes = figure.subplots()
  by_key = {case.key: case for case in cases(platform)}
  for name, times in results.items():
    points = [
      (c.flops / c.least_bytes, c.flops / times[key] / 1e12)
      for key, c in by_key.items()
      if key in times
    ]
    if points:
      axes.plot(*zip(*points, strict=True), "o", alpha=0.6, label=name)
  if device in _PEAKS:
    flops, bandwidth = _PEAKS[device]
    x = np.geomspace(1, 1e5)
    axes.plot(x, np.minimum(flops, bandwidth * x) / 1e12, "k-", label="peak")
  axes.set(
    xscale="log",
    yscale="log",
    xlabel="floating-point operations per byte of inputs and outputs",
    ylabel="TFLOP/s",
    title=f"Attention on {device}",
  )
  axes.grid(alpha=0.3)
  axes.legend(fontsize=8)
  figure.savefig(path, dpi=120)


def main(_: list[str]) -> None:
  """Runs the contestants turn by turn and reports."""
  if _RUN.value:
    platform, name = _RUN.value.split(":", 1)
    worker(name, platform)
    return
  # The contestants' processes need the memory.
  os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
  import jax

  platform, device = jax.default_backend(), jax.devices()[0].device_kind
  try:
    errors: dict[str, Any] = numerics(platform)
  except Exception as error:  # The peers' figures are wanted all the same.
    errors = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
  print(f"error over that of the plain computation: {errors}", file=sys.stderr)
  names = contestants(platform)
  seconds: dict[str, dict[str, float]] = {name: {} for name in names}
  memory: dict[str, dict[str, int]] = {name: {} for name in names}
  skipped: dict[str, dict[str, str]] = {name: {} for name in names}
  for turn in range(_ROUNDS.value):
    for name in names:
      for line in measure(name, platform):
        key = line["case"]
        if "skipped" in line:
          skipped[name][key] = line["skipped"]
          continue
        best = seconds[name].get(key, float("inf"))
        seconds[name][key] = min(best, line["seconds"])
        memory[name][key] = line["bytes"]
        print(
          f"turn {turn}: {name}: {key}: {line['seconds'] * 1e3:.4g} ms",
          file=sys.stderr,
          flush=True,
        )
  flops = {case.key: case.flops for case in cases(platform)}
  figures = {
    "platform": platform,
    "numerics": errors,
    "milliseconds": {
      n: {k: t * 1e3 for k, t in times.items()} for n, times in seconds.items()
    },
    "tflops": {
      n: {k: flops[k] / t / 1e12 for k, t in times.items()}
      for n, times in seconds.items()
    },
    "temporary_bytes": memory,
    "skipped": {n: why for n, why in skipped.items() if why},
    **checks(seconds, memory, platform),
  }
  figures = rounded(figures)
  right = "failed" not in errors and all(e <= 2 for e in errors.values())
  report("attention", **figures, ok=right)
  if _RECORD.value:
    path = record("attention", figures, device, ("jax", "torch", "tokamax"))
    draw_roofline(path.with_suffix(".png"), seconds, platform, device)


if __name__ == "__main__":
  app.run(main)
