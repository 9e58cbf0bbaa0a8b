"""jaxchunk as a contestant of `peers.py` and `chat_tail.py`."""

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
  alpha_of,
  read_documents,
  watch_resident,
  weights_path,
)

import jaxchunk as jc
from jaxchunk.chunking.executor import accumulate, make_options, warm_up
from jaxchunk.interop.hugging_face import from_hugging_face, to_hugging_face
from jaxchunk.interop.peft import save_peft
from jaxchunk.models.adapters import add_lora
from jaxchunk.models.lora import LoRA
from jaxchunk.training.config import TrainConfig
from jaxchunk.training.initial import trainable
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


def random_model(job: Job) -> jc.Transformer:
  """Without adapters."""
  return jc.Transformer(config_of(job.sizes, job.dtype), rngs=nnx.Rngs(0))


def adapted(model: jc.Transformer, job: Job) -> jc.Transformer:
  """With the job's adapters, if it has any."""
  if not job.lora:
    return model
  return add_lora(model, LoRA(rank=job.lora, alpha=alpha_of(job)))


def initial_weights(job: Job) -> dict[str, np.ndarray]:
  """What all contestants start from, as transformers names it."""
  return to_hugging_face(random_model(job))


def save_adapters(job: Job, path: pathlib.Path) -> None:
  """What all contestants with adapters start from, as PEFT names it."""
  save_peft(adapted(random_model(job), job), path)


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
    trainable=trainable(model.cfg),
    **way_of(job.contestant),
  ).compile()
  memory = compiled.memory_analysis()
  # The sums of the gradients are donated: they are arguments and results.
  return memory.temp_size_in_bytes + memory.alias_size_in_bytes


def run_compile(job: Job) -> dict[str, Any]:
  """`compiled_bytes` for a model that is only described; nothing runs."""
  model = nnx.eval_shape(lambda: adapted(random_model(job), job))
  return {"compiled_bytes": compiled_bytes(model, job.length, job)}


class Trainer:
  """Parameters and the optimizer's state, and a step over documents."""

  def __init__(self, job: Job, folder: pathlib.Path):
    self.job = job
    weights = weights_path(folder, job.shape)
    if weights.exists():
      cfg = config_of(job.sizes, job.dtype)
      with np.load(weights) as arrays:
        model = from_hugging_face(dict(arrays), cfg)
    else:
      model = random_model(job)
    # All of it, as `jaxchunk.training` does: adapters are on no device in
    # particular, and once trained they would be, which compiles anew.
    self.model = jax.device_put(adapted(model, job), jax.devices()[0])
    kind = trainable(self.model.cfg)
    self.options = make_options(
      self.model,
      chunk_size=job.chunk_size,
      trainable=kind,
      **way_of(job.contestant),
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
    self.graph, params, self.frozen = nnx.split(self.model, kind, ...)
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
      params = nnx.State(self.params)
      self.model = nnx.merge(self.graph, params, self.frozen)
    jax.block_until_ready((self.model, sums.grads, sums.loss))
    return float(sums.loss) / float(weight)


def run(job: Job, folder: pathlib.Path) -> dict[str, Any]:
  """Trains and measures; see `peers.py` for the figures."""
  steps = read_documents(folder, job)
  longest = max(len(d) - 1 for step in steps for d in step)
  start = time.perf_counter()
  trainer = Trainer(job, folder)
  warm_up(trainer.model, longest, trainer.options)
  warming = time.perf_counter() - start
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
    "warm_seconds": warming,
    "peak_bytes": resident.grown,
    "device": device.device_kind,
  }
  if job.task in ("speed", "longest"):
    figures["compiled_bytes"] = compiled_bytes(trainer.model, longest, job)
  if device.platform == "gpu":
    peak = device.memory_stats()["peak_bytes_in_use"]
    figures["peak_bytes"] = peak - in_use
  return figures
