"""Training throughput on CPU beside transformers and torch.

  python benchmarks/speed.py [--case=8k|corpus]

The same Llama (d=256, 4 layers, GQA 4/2, SwiGLU 768, fp32), the same sequences
of the standard library's bytes (two cut to 8,192; or some tokens with the
lengths that the corpus has at a 4k vocabulary), loss and gradients of all:
jaxchunk by chunks with one live chunk, so that like the peers it runs forward
twice; with all chunks live, which needs more memory; whole rows with per-layer
remat; and transformers with SDPA and gradient checkpointing at 1 and 2
threads, with active and passive waiting. Each is a process of its own (torch's
waiting policy is fixed when it starts); they take turns, and the best of each
counts. After the first turn only the best of torch's settings goes on.
"""

import json
import pathlib
import sys
import sysconfig
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from absl import app, flags
from common import report, rounded, run_contestant, torch_settings

_CASE = flags.DEFINE_enum("case", "8k", ["8k", "corpus"], "Which documents.")
_ROUNDS = flags.DEFINE_integer("rounds", 3, "Turns.")
_RUN = flags.DEFINE_string("run", None, "For the benchmark's own processes.")
_CHUNK = flags.DEFINE_integer("chunk_size", 1024, "C.")
_TOKENS = flags.DEFINE_integer("tokens", 40_000, "Of the corpus, about.")

_ONE, _ALL = "jaxchunk, one live chunk", "jaxchunk, all chunks live"
_WHOLE = "jaxchunk, whole rows, remat"

_SHAPE = {
  "vocab": 256,
  "d_model": 256,
  "layers": 4,
  "heads": 4,
  "kv_heads": 2,
  "d_ff": 768,
}


def documents(case: str) -> list[np.ndarray]:
  """Whole documents as bytes: two of 8k, or some of the corpus."""
  root = pathlib.Path(sysconfig.get_path("stdlib"))
  files = sorted(p for p in root.glob("*.py") if p.stat().st_size > 0)
  texts = [np.frombuffer(p.read_bytes(), np.uint8) for p in files]
  if case == "8k":
    long = [t for t in texts if len(t) > 8192][:2]
    return [t[:8193].astype(np.int32) for t in long]
  rng = np.random.default_rng(0)
  picked: list[np.ndarray] = []
  for n in rng.permutation(len(texts)):
    # Bytes are 3.3 tokens of the 4k vocabulary: cut to the lengths that the
    # documents have in tokens, so that the distribution is the corpus's own.
    length = min(int(len(texts[n]) / 3.33), 24_576)
    if length > 1:
      picked.append(texts[n][:length].astype(np.int32))
    if sum(map(len, picked)) > _TOKENS.value:
      break
  return picked


def run_jaxchunk(docs: list[np.ndarray], way: str) -> Callable[[], float]:
  import jax
  import jax.numpy as jnp
  from flax import nnx

  import jaxchunk as jc
  from jaxchunk.chunking.executor import accumulate, make_options
  from jaxchunk.types import Example

  cfg = jc.ModelConfig(
    vocab_size=_SHAPE["vocab"],
    d_model=_SHAPE["d_model"],
    num_layers=_SHAPE["layers"],
    num_heads=_SHAPE["heads"],
    num_kv_heads=_SHAPE["kv_heads"],
    d_ff=_SHAPE["d_ff"],
  )
  model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
  weight = sum(len(d) - 1 for d in docs)
  if way != _WHOLE:
    examples = [
      Example(d[:-1], d[1:], np.ones(len(d) - 1, np.float32)) for d in docs
    ]

    options = make_options(
      model,
      chunk_size=_CHUNK.value,
      live_chunks=1 if way == _ONE else 64,
      strategy="chunk_outer",
    )

    def chunked() -> float:
      sums = accumulate(model, examples, options)
      jax.block_until_ready(sums.grads)
      return float(sums.loss) / weight

    return chunked

  @jax.jit
  def gradient(model: Any, row: Any) -> Any:
    def loss(model: Any) -> Any:
      h = model.hidden(row[:, :-1], implementation="xla", remat=True)
      nll, _ = jc.linear_cross_entropy(h, model.unembed, row[:, 1:])
      return nll.sum()

    return jax.value_and_grad(loss)(model)

  def full() -> float:
    total, grads = 0.0, None
    for doc in docs:
      loss, part = gradient(model, jnp.asarray(doc)[None])
      grads = part if grads is None else jax.tree.map(jnp.add, grads, part)
      total += loss
    jax.block_until_ready(grads)
    return float(total) / weight

  return full


def run_torch(docs: list[np.ndarray], threads: int) -> Callable[[], float]:
  import torch
  import transformers

  torch.set_num_threads(threads)
  torch.manual_seed(0)
  config = transformers.LlamaConfig(
    vocab_size=_SHAPE["vocab"],
    hidden_size=_SHAPE["d_model"],
    num_hidden_layers=_SHAPE["layers"],
    num_attention_heads=_SHAPE["heads"],
    num_key_value_heads=_SHAPE["kv_heads"],
    intermediate_size=_SHAPE["d_ff"],
    max_position_embeddings=1 << 16,
    attn_implementation="sdpa",
    use_cache=False,
  )
  model = transformers.LlamaForCausalLM(config)
  model.gradient_checkpointing_enable()
  model.train()
  rows = [torch.tensor(d, dtype=torch.long)[None] for d in docs]
  weight = sum(len(d) - 1 for d in docs)

  def step() -> float:
    model.zero_grad()
    total = 0.0
    for row in rows:
      logits = model(input_ids=row[:, :-1]).logits
      loss = torch.nn.functional.cross_entropy(
        logits[0], row[0, 1:], reduction="sum"
      )
      loss.backward()
      total += loss.item()
    return total / weight

  return step


def worker(run: str) -> None:
  """Times one contestant in this process and prints a JSON line."""
  docs = documents(_CASE.value)
  if run.startswith("torch"):
    step = run_torch(docs, int(run.split()[1]))
  else:
    step = run_jaxchunk(docs, run)
  loss = step()
  start = time.perf_counter()
  step()
  seconds = time.perf_counter() - start
  tokens = sum(len(d) - 1 for d in docs)
  print(json.dumps({"tokens_per_sec": tokens / seconds, "loss": loss}))


def measure(run: str) -> dict[str, float]:
  policy = run.split()[-1] if run.startswith("torch") else "passive"
  lines, code = run_contestant(
    [
      __file__,
      f"--run={run}",
      f"--case={_CASE.value}",
      f"--chunk_size={_CHUNK.value}",
      f"--tokens={_TOKENS.value}",
    ],
    policy,
  )
  if code:
    raise RuntimeError(f"{run} ended with exit code {code}")
  return lines[-1]


def main(_: list[str]) -> None:
  if _RUN.value:
    worker(_RUN.value)
    return
  contestants = [_ONE, _ALL]
  if _CASE.value == "8k":
    # Of many lengths, whole rows would be a program for each.
    contestants.append(_WHOLE)
  contestants += [f"torch {n} {policy}" for n, policy in torch_settings()]
  speed = dict.fromkeys(contestants, 0.0)
  loss: dict[str, float] = {}
  for turn in range(_ROUNDS.value):
    for run in contestants:
      result = measure(run)
      print(f"turn {turn}: {run}: {result}", file=sys.stderr, flush=True)
      speed[run] = max(speed[run], result["tokens_per_sec"])
      loss[run] = result["loss"]
    peers = [run for run in contestants if run.startswith("torch")]
    best = max(peers, key=speed.__getitem__)
    contestants = [r for r in contestants if r == best or r not in peers]
  torch_best = max(v for k, v in speed.items() if k.startswith("torch"))
  ratios = {
    "over_torch": speed[_ONE] / torch_best,
    "all_live_over_torch": speed[_ALL] / torch_best,
  }
  if _WHOLE in speed:
    ratios["over_whole_rows"] = speed[_ONE] / speed[_WHOLE]
  same = [loss[name] for name in (_ONE, _ALL, _WHOLE) if name in loss]
  report(
    "speed",
    case=_CASE.value,
    chunk_size=_CHUNK.value,
    tokens=sum(len(d) - 1 for d in documents(_CASE.value)),
    tokens_per_sec=rounded(speed),
    ratio=rounded(ratios),
    loss=rounded(loss),
    ok=ratios["over_torch"] >= 1
    and ratios.get("over_whole_rows", 1) >= 0.95
    and max(same) - min(same) < 1e-4,
  )


if __name__ == "__main__":
  app.run(main)
