"""jaxchunk as a contestant of `peers.py`."""

import pathlib
import time
from typing import Any

import jax
import numpy as np
from flax import nnx
from peers_job import (
  BETAS,
  DECAY,
  EPSILON,
  Job,
  Shape,
  read_documents,
  watch_resident,
  weights_path,
)

import jaxchunk as jc
from jaxchunk.chunking.executor import accumulate, make_options, warm_up
from jaxchunk.interop.hugging_face import from_hugging_face, to_hugging_face
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.optimizer import init_state, make_optimizer, make_update
from jaxchunk.types import Example

# Live chunks and strategy; a longer lane than 64 chunks would run some twice.
WAYS: dict[str, dict[str, Any]] = {
  "one live chunk": {"live_chunks": 1, "strategy": "chunk_outer"},
  "all chunks live": {"live_chunks": 64, "strategy": "chunk_outer"},
  "layer-outer": {"live_chunks": 1, "strategy": "layer_outer"},
}


def way_of(contestant: str) -> dict[str, Any]:
  """Options of "jaxchunk, WAY" or "jaxchunk IMPLEMENTATION, WAY"."""
  name, way = contestant.split(", ")
  implementation = name.removeprefix("jaxchunk").strip() or "xla"
  return {**WAYS[way], "implementation": implementation}


def config_of(shape: Shape, dtype: str) -> jc.ModelConfig:
  """The shape as a configuration."""
  return jc.ModelConfig(
    vocab_size=shape.vocab,
    d_model=shape.d_model,
    num_layers=shape.layers,
    num_heads=shape.heads,
    num_kv_heads=shape.kv_heads,
    head_dim=shape.head_dim,
    d_ff=shape.d_ff,
    tie_embeddings=shape.tied,
    dtype=dtype,
    param_dtype=dtype,
  )


def initial_weights(job: Job) -> dict[str, np.ndarray]:
  """What all contestants start from, as transformers names it."""
  cfg = config_of(job.sizes, job.dtype)
  return to_hugging_face(jc.Transformer(cfg, rngs=nnx.Rngs(0)))


def examples_of(documents: list[np.ndarray]) -> list[Example]:
  """Documents as sequences to train on."""
  return [
    Example(d[:-1], d[1:], np.ones(len(d) - 1, np.float32)) for d in documents
  ]


def compiled_bytes(model: jc.Transformer, length: int, job: Job) -> int:
  """What the compiler says that the program of a length holds besides weights.

  The state, the activations and the gradient sums; the weights and the
  optimizer's moments are not in it.
  """
  compiled = jc.lower_chunked(
    model,
    capacity=length,
    chunk_size=job.chunk_size,
    **way_of(job.contestant),
  ).compile()
  memory = compiled.memory_analysis()
  # The sums of the gradients are donated: they are arguments and results.
  return memory.temp_size_in_bytes + memory.alias_size_in_bytes


def run_compile(job: Job) -> dict[str, Any]:
  """`compiled_bytes` for a model that is only described; nothing runs."""
  cfg = config_of(job.sizes, job.dtype)
  model = nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))
  return {"compiled_bytes": compiled_bytes(model, job.length, job)}


class Trainer:
  """Parameters and the optimizer's state, and a step over documents."""

  def __init__(self, job: Job, folder: pathlib.Path):
    self.job = job
    cfg = config_of(job.sizes, job.dtype)
    weights = weights_path(folder, job.shape)
    if weights.exists():
      with np.load(weights) as arrays:
        self.model = from_hugging_face(dict(arrays), cfg)
    else:
      self.model = jc.Transformer(cfg, rngs=nnx.Rngs(0))
    self.options = make_options(
      self.model, chunk_size=job.chunk_size, **way_of(job.contestant)
    )
    if not job.update:
      return
    train = TrainConfig(
      learning_rate=job.learning_rate,
      # Constant: it ends where it starts.
      warmup_steps=0,
      final_learning_rate=1.0,
      weight_decay=DECAY,
      clip_norm=None,
      beta1=BETAS[0],
      beta2=BETAS[1],
      epsilon=EPSILON,
    )
    self.graph, params = nnx.split(self.model)
    self.params = nnx.to_pure_dict(params)
    self.state = init_state(make_optimizer(train), self.params)
    self.update = make_update(train)
    # Compile it, on parameters that are thrown away.
    copies = jax.tree.map(lambda a: a.copy(), (self.params, self.state))
    zeros = jax.tree.map(lambda a: a * 0, self.params)
    one = np.float32(1)
    jax.block_until_ready(self.update(*copies, one * 0, one, zeros))

  def step(self, documents: list[np.ndarray]) -> float:
    """The mean loss before the update."""
    examples = examples_of(documents)
    sums = accumulate(self.model, examples, self.options)
    weight = np.float32(sums.weight)
    if self.job.update:
      self.params, self.state, _ = self.update(
        self.params,
        self.state,
        sums.loss,
        weight,
        nnx.to_pure_dict(sums.grads),
      )
      self.model = nnx.merge(self.graph, nnx.State(self.params))
    jax.block_until_ready((self.model, sums.grads, sums.loss))
    return float(sums.loss) / float(weight)


def run(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """Trains and measures; see `peers.py` for the figures."""
  steps = read_documents(folder, job)
  longest = max(len(d) - 1 for step in steps for d in step)
  trainer = Trainer(job, folder)
  warm_up(trainer.model, longest, trainer.options)
  losses, seconds = [], []
  device = jax.devices()[0]
  if device.platform == "gpu":
    in_use = device.memory_stats()["bytes_in_use"]
  with watch_resident() as resident:
    for documents in steps:
      start = time.perf_counter()
      losses.append(trainer.step(documents))
      seconds.append(time.perf_counter() - start)
  figures = {
    "losses": losses,
    "seconds": seconds,
    "peak_bytes": resident.grown,
    "device": device.device_kind,
  }
  if job.task != "curve":
    figures["compiled_bytes"] = compiled_bytes(trainer.model, longest, job)
  if device.platform == "gpu":
    peak = device.memory_stats()["peak_bytes_in_use"]
    figures["peak_bytes"] = peak - in_use
  return figures
