"""What a run needs on each device, by formula.

What is kept (parameters, gradients, the optimizer's state) follows exactly
from shapes and the layout. What a lane adds is counted: the sequence state of
its capacity, what live chunks keep, gathered parameters. What is at work on
one layer and chunk is counted with factors fitted to the compiler's account.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax.numpy as jnp

from jaxchunk.chunking.lanes import capacity_chunks
from jaxchunk.chunking.memory import (
  state_bytes_per_token,
  working_bytes_per_token,
)
from jaxchunk.chunking.ops import Keep
from jaxchunk.kernels.cross_entropy.xla import choose_grad_blocks
from jaxchunk.models.config import ModelConfig
from jaxchunk.planner.candidates import Candidate, Request
from jaxchunk.planner.kept import Kept, Model, Pair, slot_bytes_per_token
from jaxchunk.planner.pipeline import slots_of
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.tables import Pipeline


@dataclasses.dataclass(frozen=True)
class Factors:
  """What a compiler was seen to hold.

  Attributes:
    working: Of `working_bytes_per_token`.
    adapted: The same where adapters alone are trained.
    gradients: Copies of a layer's gradients before they are added up.
    inputs: Copies of the layers' inputs, layer-outer.
    live: Of what several live chunks keep.
    visited: Of keys and values that queries of other devices visit.
    host: Of keys, values and gradients in host memory, with gaps.
    updates: Of the gradients that AdamW updates with, by one device or many.
    eight_bits: Of the head in fp32, and of the other embedding, where moments
      of 8 bits are updated.
    sums: Of gradients that are added up over devices.
    turned: Copies of a head that is gathered or scattered.
  """

  working: float
  adapted: float
  gradients: float
  inputs: float
  live: float
  visited: float
  host: float
  updates: tuple[float, float]
  eight_bits: tuple[float, float]
  sums: float
  turned: float


# Fitted to the cases of docs/planning.md.
_FACTORS = {
  "gpu": Factors(
    working=0.37,
    adapted=0.7,
    gradients=2.0,
    inputs=1.0,
    live=1.0,
    visited=1.0,
    host=1.0,
    updates=(1.04, 1.45),
    eight_bits=(1.0, 0.0),
    sums=0.9,
    turned=2.0,
  ),
  "tpu": Factors(
    working=0.37,
    adapted=0.7,
    gradients=1.0,
    inputs=2.0,
    live=1.15,
    visited=1.5,
    host=1.34,
    updates=(1.0, 1.0),
    eight_bits=(8.0, 2.2),
    sums=0.35,
    turned=1.0,
  ),
}


class Predicted(NamedTuple):
  """What a candidate needs on a device.

  Attributes:
    programs: Bytes while each program runs, with all that lies there.
    parts: What the largest lane's are made of.
    host: Bytes of host memory.
  """

  programs: dict[str, int]
  parts: dict[str, int]
  host: int

  @property
  def peak(self) -> int:
    """The most of all programs."""
    return max(self.programs.values())


def local_config(cfg: ModelConfig, parts: int) -> ModelConfig:
  """The part of a model that one of so many devices of "tensor" works with."""
  moe = cfg.moe
  if moe is not None:
    moe = dataclasses.replace(
      moe,
      d_ff=moe.d_ff // parts,
      shared_d_ff=moe.shared_d_ff // parts,
    )
  return dataclasses.replace(
    cfg,
    num_heads=cfg.num_heads // parts,
    num_kv_heads=cfg.kv_heads // parts,
    head_dim=cfg.head_width,
    d_ff=cfg.d_ff // parts,
    vocab_size=cfg.vocab_size // parts,
    moe=moe,
  )


class Memory:
  """What candidates of one request need; layouts are looked at once."""

  def __init__(self, request: Request):
    self.request = request
    self.factors = _FACTORS[request.machine.target.platform]
    self._kept = functools.cache(Model(request).kept)
    self.slot = functools.cache(self._slot)
    self.local = functools.cache(functools.partial(local_config, request.model))

  def kept(self, layout: Layout) -> Kept:
    """The parameters of a layout, whose schedule is no matter."""
    return self._kept(dataclasses.replace(layout, pipeline=Pipeline()))

  def predict(self, candidate: Candidate) -> Predicted:
    """Bytes of a device while each program of a run is running."""
    kept = self.kept(candidate.layout)
    parts, host = self._lane(candidate, kept)
    programs = {
      "lane": sum(parts.values()),
      "update": self._update(candidate, kept),
    }
    # Over stages the loss is that of the gradient's program.
    if self.request.train.eval_every and candidate.layout.stage == 1:
      programs["evaluation"] = self._evaluation(candidate, kept)
    if candidate.layout.num_devices > 1:
      programs["sums"] = self._sums(candidate, kept)
    return Predicted(
      {name: round(size) for name, size in programs.items()},
      {name: round(size) for name, size in parts.items()},
      round(host),
    )

  def _slot(self, parts: int, keep: Keep) -> float:
    """Of a token, what a live chunk keeps on one of so many of "tensor"."""
    return slot_bytes_per_token(self.local(parts), keep)

  def _lane(
    self, candidate: Candidate, kept: Kept
  ) -> tuple[dict[str, float], float]:
    """While a lane of the longest sequence runs: on the device, the host."""
    size = candidate.chunk_size
    chunks = capacity_chunks(-(-self.request.lengths.longest // size))
    part = size // candidate.layout.context
    layout = candidate.layout
    local = self.local(layout.tensor)
    parts = self._beside(candidate, kept)
    working = self._working(candidate, kept)
    vocab = local.vocab_size
    if "stage" in layout.rules["vocab"]:
      vocab //= layout.stage
    head = self._head(kept, part, dataclasses.replace(local, vocab_size=vocab))
    if candidate.strategy == "layer_outer" and chunks > 1:
      parts |= self._layer_outer(candidate, chunks * part, working, head)
      return parts, kept.optimizer_host
    state, live = self._chunk_outer(candidate, local, chunks)
    host = kept.optimizer_host
    if candidate.kv_memory == "host":
      host, state = host + self.factors.host * state, 0.0
    parts |= {
      "keys, values, gradients": state,
      "live chunks": live,
      "at work": max(working, head),
    }
    return parts, host

  def _working(self, candidate: Candidate, kept: Kept) -> float:
    """While one layer's backward pass runs on a chunk."""
    cfg, layout = self.request.model, candidate.layout
    local, size = self.local(layout.tensor), candidate.chunk_size
    factor = self.factors.adapted if cfg.lora else self.factors.working
    part = size // layout.context
    found = part * factor * working_bytes_per_token(local)
    found += self.factors.gradients * kept.layer.gradients
    if layout.context > 1:
      # Queries of all devices, what they found, and the gradients of both.
      item = jnp.dtype(cfg.dtype).itemsize
      found += 6 * item * size * local.num_heads * cfg.head_width
    # A layer is gathered and turned; its gradient is turned and scattered.
    gathered = kept.gathered_layer
    return found + gathered.weights + 2 * gathered.gradients

  def _layer_outer(
    self, candidate: Candidate, tokens: int, working: float, head: float
  ) -> dict[str, float]:
    """What a lane takes of whose tokens a device has so many."""
    cfg, layout = self.request.model, candidate.layout
    item = jnp.dtype(cfg.dtype).itemsize
    # They are whole on all devices of "tensor".
    inputs = tokens * (cfg.num_layers + 1) * cfg.d_model * item
    state = self._state(candidate).scaled(tokens / cfg.num_layers)
    part = candidate.chunk_size // layout.context
    one = part * self.slot(layout.tensor, candidate.keep) / cfg.num_layers
    rest = max(one + working + state.both, head + state.weights)
    copies = (self.factors.inputs - 1) * inputs + state.weights
    return {"layer inputs": inputs, "at work": max(rest, copies)}

  def _state(self, candidate: Candidate) -> Pair:
    """Of a token: keys and values of all layers, and their gradients."""
    layout = candidate.layout
    local = self.local(layout.tensor)
    item = jnp.dtype(local.dtype).itemsize
    channels = 2 * local.kv_heads * local.head_width
    keys = local.num_layers * channels * item
    gradients = state_bytes_per_token(local, "chunk_outer") - keys
    if self.request.machine.target.implementation != "xla":
      # Its kernels keep gradients of window layers for the whole lane, too.
      wide = jnp.promote_types(local.dtype, jnp.float32).itemsize
      gradients = local.num_layers * channels * wide
    copies = self.factors.visited if layout.context > 1 else 1
    return Pair(keys * copies, gradients)

  def _beside(self, candidate: Candidate, kept: Kept) -> dict[str, float]:
    """What lies there whatever runs, with gradients."""
    once = candidate.layout.gather == "step"
    own = kept.used if once else kept.stored
    return {
      "parameters": own.weights + (kept.stored.weights if once else 0),
      "gradients": own.gradients,
      "optimizer": kept.optimizer,
    }

  def _head(self, kept: Kept, tokens: int, local: ModelConfig) -> float:
    """The loss of a chunk and its gradient."""
    wide = jnp.promote_types(local.dtype, jnp.float32).itemsize
    vocab, width = local.vocab_size, local.d_model
    blocks = choose_grad_blocks(tokens, vocab, width, wide)
    logits = blocks.rows * wide * (vocab if blocks.keep else blocks.vocab)
    head = kept.gathered_head
    copies = self.factors.turned
    # First it is gathered; at last its gradient is scattered, and a part left.
    gathered = max(
      head.gradients + copies * head.weights + logits,
      (copies + 1 / kept.shared) * head.gradients,
    )
    found = 3 * tokens * width * wide
    return found + (gathered if head.weights else 2 * logits)

  def _chunk_outer(
    self, candidate: Candidate, local: ModelConfig, chunks: int
  ) -> tuple[float, float]:
    """Bytes of the sequence state of a lane, and of what chunks keep."""
    layout, cfg = candidate.layout, self.request.model
    part = candidate.chunk_size // layout.context
    keys, gradients = self._state(candidate)
    one = part * self.slot(layout.tensor, candidate.keep)
    live = min(candidate.live_chunks, chunks)
    if candidate.schedule is None:
      copies = self.factors.live if live > 1 else 1
      return chunks * part * (keys + gradients), live * copies * one
    size = candidate.chunk_size * candidate.groups
    total = -(-self.request.batch_tokens // size)
    slots = slots_of(candidate.schedule, layout.stage, chunks, total, live)
    share = part / (layout.stage * slots.parts)
    each = self.slot(layout.tensor, candidate.keep)
    item = jnp.dtype(cfg.dtype).itemsize
    inbox = slots.inbox * part * cfg.d_model * item
    # What W reads of a chunk is taken to be as much as what B reads.
    return (
      share * (slots.keys * keys + slots.gradients * gradients),
      share * (slots.kept + slots.owed) * each + inbox,
    )

  def _update(self, candidate: Candidate, kept: Kept) -> float:
    """While parameters are updated, each device its own part of them."""
    train = self.request.train
    lies = kept.stored.weights + kept.updated + kept.optimizer
    if train.optimizer_memory == "host":
      # What comes from the host: a layer's, or the head's.
      return lies + 2 * max(kept.layer.gradients, kept.head.gradients)
    # New parameters are found in parts, and gathered beside the old ones.
    new = kept.stored.weights if kept.copies else 0
    if self.request.model.lora:
      return lies + new
    many = candidate.layout.num_devices > 1
    works = kept.updated * self.factors.updates[many]
    if train.optimizer == "adamw8bit":
      # By layer, but for what is not in layers.
      head, other = self.factors.eight_bits
      works = head * kept.updated_head + other * kept.updated_embedding
      works = max(works, kept.layer.gradients)
    if self.request.machine.target.platform == "tpu":
      return lies + works + new
    return lies + max(works, new)

  def _evaluation(self, candidate: Candidate, kept: Kept) -> float:
    """While the loss of the longest held-out sequence is found."""
    layout = candidate.layout
    size, train = candidate.chunk_size, self.request.train
    tokens = min(self.request.lengths.longest, train.eval_tokens)
    capacity = capacity_chunks(-(-tokens // size)) * size
    local, part = self.local(layout.tensor), size // layout.context
    keys = self._state(candidate).weights
    beside = self._beside(candidate, kept)
    state = 0.0 if candidate.kv_memory == "host" else keys
    working = part * working_bytes_per_token(local) / 3
    gathered = self.factors.turned * max(
      kept.gathered_layer.weights, kept.gathered_head.weights
    )
    return (
      beside["parameters"]
      + kept.optimizer
      + capacity / layout.context / layout.stage * state
      + working
      + gathered
    )

  def _sums(self, candidate: Candidate, kept: Kept) -> float:
    """While gradients are added up over the devices that have their own."""
    beside = self._beside(candidate, kept)
    # Of those that have copies a part is sent to each device.
    sent = self.factors.sums * beside["gradients"] if kept.copies else 0
    return sum(beside.values()) + sent + kept.updated
