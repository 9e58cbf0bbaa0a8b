"""What chunks cost to compute, by formula: FLOPs of a step and their balance.

A forward pass of a chunk of C tokens behind a prefix costs `a * C + b * pairs`
FLOPs, where pairs counts the (query, key) pairs that its tokens may see: about
`C * prefix` for a chunk of a long sequence. A product of `[m, k]` by `[k, n]`
counts `2 * m * k * n`; norms, softmax and other element-wise work count
nothing, embeddings are looked up, and within a block of attention the pairs
that its mask hides are not counted either.

Of experts those count that a token goes to, not empty slots of a capacity, and
not what a backend without ragged products multiplies in vain (XLA on CPU
multiplies every copy of a token by every expert).

Where a model has adapters, they alone are trained: the matrices beside them
and the head cost no product for their own gradients.

Tests hold the formulas against the compiler's account of the same products.
"""

import dataclasses
from collections.abc import Iterable, Sequence

import jax.numpy as jnp

from jaxchunk.chunking.memory import Strategy
from jaxchunk.chunking.plan import Chunk, ChunkPlan
from jaxchunk.kernels.cross_entropy.xla import choose_grad_blocks
from jaxchunk.models.config import ModelConfig


def visible_pairs(start: int, stop: int, window: int | None = None) -> int:
  """Pairs of a query among tokens [start, stop) of a sequence and a key.

  Args:
    start: First token, from 0.
    stop: Behind the last.
    window: Keys that a token sees at most, itself included; `None` is all.
  """

  def of_first(n: int) -> int:
    near = n if window is None else min(n, window)
    return near * (near + 1) // 2 + (n - near) * near

  return of_first(stop) - of_first(start)


def layer_flops_per_token(cfg: ModelConfig) -> int:
  """FLOPs of the layers' matrix products for one token, forward."""
  return _matrix_flops(cfg) + _adapter_flops(cfg)


def _matrix_flops(cfg: ModelConfig) -> int:
  one = sum(n * m for n, m in _matrices(cfg).values())
  if cfg.moe is not None:
    copies = 3 * cfg.d_model * cfg.moe.d_ff * cfg.moe.experts_per_token
    one += cfg.d_model * cfg.moe.num_experts + copies
  return 2 * cfg.num_layers * one


def _adapter_flops(cfg: ModelConfig) -> int:
  if cfg.lora is None:
    return 0
  sides = sum(sum(_matrices(cfg)[name]) for name in cfg.lora.targets)
  return 2 * cfg.num_layers * cfg.lora.rank * sides


def _matrices(cfg: ModelConfig) -> dict[str, tuple[int, int]]:
  """Inputs and outputs of a layer's matrices, but for routers and experts."""
  heads, keys = cfg.num_heads * cfg.head_width, cfg.kv_heads * cfg.head_width
  D, F = cfg.d_model, cfg.mlp_width
  return {
    "q": (D, heads),
    "k": (D, keys),
    "v": (D, keys),
    "o": (heads, D),
    "gate": (D, F),
    "up": (D, F),
    "down": (F, D),
  }


def active_parameters(cfg: ModelConfig, total: int) -> int:
  """Of so many parameters, those that a token goes through."""
  if cfg.moe is None:
    return total
  idle = cfg.moe.num_experts - cfg.moe.experts_per_token
  return total - cfg.num_layers * 3 * cfg.d_model * cfg.moe.d_ff * idle


def head_flops_per_token(cfg: ModelConfig) -> int:
  """FLOPs of one token's logits."""
  return 2 * cfg.vocab_size * cfg.d_model


def attention_flops(cfg: ModelConfig, start: int, stop: int) -> int:
  """FLOPs of attention in all layers for tokens [start, stop), forward.

  Two products of H channels for each query head and visible pair: sharing keys
  between query heads saves memory, not products.
  """
  pairs = sum(
    cfg.layers_of(position) * visible_pairs(start, stop, window)
    for position, window in enumerate(cfg.window_pattern)
  )
  return 4 * cfg.num_heads * cfg.head_width * pairs


def model_flops(cfg: ModelConfig, lengths: Iterable[int]) -> int:
  """FLOPs that training on whole sequences needs: the numerator of the MFU.

  Forward once and backward twice that (Chowdhery et al., PaLM, arXiv
  2204.02311), or once that for matrices that are not trained, without
  recomputation and padding. Attention counts the visible pairs alone, about
  half of PaLM's `12 * L * N * H * T` for a long sequence.

  Args:
    cfg: The model.
    lengths: Positions of each sequence.
  """
  matrices = _matrix_flops(cfg) + head_flops_per_token(cfg)
  passes = 3 if cfg.lora is None else 2
  per_token = passes * matrices + 3 * _adapter_flops(cfg)
  return sum(n * per_token + 3 * attention_flops(cfg, 0, n) for n in lengths)


@dataclasses.dataclass(frozen=True)
class ChunkCost:
  """FLOPs of one chunk, its padding included.

  Attributes:
    forward: Of the layers.
    backward: Of the head's loss and gradient, and of the layers.
  """

  forward: int
  backward: int

  @property
  def total(self) -> int:
    """Forward once and backward."""
    return self.forward + self.backward


@dataclasses.dataclass(frozen=True)
class StepCost:
  """FLOPs of a step, as the executor runs it on its default kernels.

  Attributes:
    model: What the sequences need, see `model_flops`.
    recomputed: Done again to save memory, or first to know a batch's balance:
      chunks that run forward more than once, attention's scores in the
      backward pass, logits that were not kept.
    padding: Spent on padding, recomputation of it included.
    chunks: Of each chunk, lane by lane.
    lanes: Of each lane, recomputation included.
  """

  model: int
  recomputed: int
  padding: int
  chunks: list[list[ChunkCost]]
  lanes: list[int]

  @property
  def hardware(self) -> int:
    """All of it: the numerator of the HFU."""
    return self.model + self.recomputed + self.padding

  @property
  def chunk_imbalance(self) -> float:
    """Costliest chunk over the mean; 1 is even.

    Stages of a pipeline tick together, so the share of time that they would
    wait is `1 - 1 / imbalance`.
    """
    return _imbalance([c.total for lane in self.chunks for c in lane])

  @property
  def lane_imbalance(self) -> float:
    """Costliest lane over the mean; 1 is even.

    The same for devices that take one lane each and wait for the last.
    """
    return _imbalance(self.lanes)


def plan_cost(
  cfg: ModelConfig,
  plan: ChunkPlan,
  *,
  live_chunks: int,
  strategy: Strategy,
) -> StepCost:
  """What the gradient of a planned batch costs.

  Args:
    cfg: The model.
    plan: How the batch is cut.
    live_chunks: K.
    strategy: Which loop is outside, as in `executor.Options`.
  """
  size = plan.chunk_size
  chunks = [[chunk_cost(cfg, c, size) for c in x.chunks] for x in plan.lanes]
  lanes, padding = [], 0
  for lane, costs in zip(plan.lanes, chunks, strict=True):
    passes = forward_passes(len(costs), live_chunks, strategy)
    if cfg.moe is not None and cfg.moe.balance_loss:
      passes = [n + 1 for n in passes]
    extra = 0
    if runs_layer_outer(len(costs), strategy):
      extra = _layer_outer_extra(cfg)
    lanes.append(
      len(costs) * size * extra
      + sum(
        n * c.forward + c.backward for n, c in zip(passes, costs, strict=True)
      )
    )
    per_token, backward = (
      layer_flops_per_token(cfg),
      _linear_backward(cfg, size),
    )
    padding += sum(
      (size - chunk.tokens) * (n * per_token + extra + backward)
      for n, chunk in zip(passes, lane.chunks, strict=True)
    )
  needed = model_flops(cfg, plan.lengths)
  return StepCost(
    model=needed,
    recomputed=sum(lanes) - needed - padding,
    padding=padding,
    chunks=chunks,
    lanes=lanes,
  )


def chunk_cost(cfg: ModelConfig, chunk: Chunk, chunk_size: int) -> ChunkCost:
  """FLOPs of a chunk with what it holds; its padding attends to nothing."""
  attention = sum(attention_flops(cfg, p.start, p.stop) for p in chunk.pieces)
  # Five products for the forward's two: the scores are computed again.
  backward = chunk_size * _linear_backward(cfg, chunk_size)
  return ChunkCost(
    forward=chunk_size * layer_flops_per_token(cfg) + attention,
    backward=backward + attention * 5 // 2,
  )


def runs_layer_outer(num_chunks: int, strategy: Strategy) -> bool:
  """Whether a lane runs layer by layer: in one chunk nothing is to choose."""
  return strategy == "layer_outer" and num_chunks > 1


def forward_passes(
  num_chunks: int, live_chunks: int, strategy: Strategy
) -> list[int]:
  """How often each chunk of a lane runs forward."""
  if runs_layer_outer(num_chunks, strategy):
    return [2] * num_chunks
  twice = max(num_chunks - live_chunks, 0)
  return [2] * twice + [1] * (num_chunks - twice)


def _layer_outer_extra(cfg: ModelConfig) -> int:
  """What layer-outer adds per token to forward twice and backward.

  Before its backward a layer writes the keys and values of all chunks. Running
  it forward once more then ends before the MLP's last product, unless a norm
  behind it wants that.
  """
  keys = cfg.kv_heads * cfg.head_width
  ends_early = 0 if cfg.post_norms else 2 * cfg.active_width
  return cfg.num_layers * cfg.d_model * (4 * keys - ends_early)


def _linear_backward(cfg: ModelConfig, chunk_size: int) -> int:
  """Per token; the head's loss runs with its gradient, in 3 or 4 products."""
  item = jnp.promote_types(cfg.dtype, jnp.float32).itemsize
  blocks = choose_grad_blocks(chunk_size, cfg.vocab_size, cfg.d_model, item)
  products = 3 if blocks.keep else 4
  matrices, head = _matrix_flops(cfg), head_flops_per_token(cfg)
  if cfg.lora is None:
    return 2 * matrices + products * head
  # `x @ a` is computed again.
  adapters = _adapter_flops(cfg) * 5 // 2
  return matrices + adapters + (products - 1) * head


def _imbalance(costs: Sequence[int]) -> float:
  return max(costs) * len(costs) / sum(costs) if costs else 1.0
