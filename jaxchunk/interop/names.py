"""Which tensor of a published checkpoint holds which of our parameters.

Published matrices are `[out, in]` and layers are apart; here they are
`[in, out]` and stacked. Some architectures publish several of our matrices as
one tensor, under each other.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, Literal

from jaxchunk.models.config import ModelConfig

LINEARS = {
  ("q",): "self_attn.q_proj",
  ("k",): "self_attn.k_proj",
  ("v",): "self_attn.v_proj",
  ("o",): "self_attn.o_proj",
  ("gate",): "mlp.gate_proj",
  ("up",): "mlp.up_proj",
  ("down",): "mlp.down_proj",
}
_FUSED_LINEARS = {
  ("q", "k", "v"): "self_attn.qkv_proj",
  ("o",): "self_attn.o_proj",
  ("gate", "up"): "mlp.gate_up_proj",
  ("down",): "mlp.down_proj",
}
_PRE_NORMS = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
}
_POST_NORMS = {
  "attention_post_norm": "post_attention_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_BOTH_NORMS = _POST_NORMS | {
  "attention_norm": "input_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}

# In front of the router and the experts, and the names of the latter.
_EXPERTS = {
  "mixtral": ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"}),
  "qwen3": (
    "mlp",
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"},
  ),
}
ExpertNames = Literal["mixtral", "qwen3"]

EMBED = "embed_tokens.weight"
HEAD = "lm_head.weight"

Path = tuple[Any, ...]
"""Of a parameter, as `nnx.to_flat_state` has it: `("blocks", 0, "q", ...)`."""


@dataclasses.dataclass(frozen=True)
class Part:
  """What a tensor holds of our parameters.

  Attributes:
    path: Of the parameter, as in `nnx.State`.
    layer: Of a stack; `None` where it is not one.
    expert: Of those of the layer; `None` where there are none.
  """

  path: Path
  layer: int | None = None
  expert: int | None = None

  @property
  def index(self) -> tuple[int, ...]:
    """Where it lies in the parameter, along the first axes."""
    return tuple(n for n in (self.layer, self.expert) if n is not None)


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of a published checkpoint.

  Attributes:
    name: With the usual prefix, "model.".
    parts: What it holds; several lie under each other, along axis 0.
    transposed: Whether ours is its transpose.
  """

  name: str
  parts: tuple[Part, ...]
  transposed: bool = False


def tensors(
  cfg: ModelConfig,
  *,
  fused: bool = False,
  experts: ExpertNames | None = None,
) -> Iterator[Tensor]:
  """Every tensor of a model, layer by layer.

  Args:
    cfg: The frozen configuration.
    fused: Whether q, k, v are published as one matrix, and gate, up.
    experts: How experts are named, "qwen3" by default; where there are some,
      nothing is fused.
  """
  yield Tensor(f"model.{EMBED}", (Part(("embed",)),))
  norms = {
    (True, False): _PRE_NORMS,
    (False, True): _POST_NORMS,
    (True, True): _BOTH_NORMS,
  }[cfg.pre_norms, cfg.post_norms]
  norms = norms | (_QK_NORMS if cfg.qk_norm else {})
  linears = _FUSED_LINEARS if fused else LINEARS
  if cfg.moe is not None:
    own = {("gate",), ("up",), ("down",)}
    linears = {group: n for group, n in LINEARS.items() if group not in own}
  for number in range(cfg.num_layers):
    layer, position = divmod(number, len(cfg.window_pattern))
    stack: Path = ("blocks", position)

    def part(*names: str, layer: int = layer, stack: Path = stack) -> Part:
      return Part((*stack, *names), layer)

    prefix = f"model.layers.{number}"
    for ours, theirs in norms.items():
      yield Tensor(f"{prefix}.{theirs}.weight", (part(ours, "scale"),))
    for group, theirs in linears.items():
      kernels = tuple(part(ours, "kernel") for ours in group)
      yield Tensor(f"{prefix}.{theirs}.weight", kernels, transposed=True)
      if cfg.qkv_bias and group[0] in ("q", "k", "v"):
        biases = tuple(part(ours, "bias") for ours in group)
        yield Tensor(f"{prefix}.{theirs}.bias", biases)
    if cfg.moe is not None:
      yield from _experts(
        f"{prefix}.", stack, layer, cfg.moe.num_experts, experts or "qwen3"
      )
  yield Tensor("model.norm.weight", (Part(("final_norm", "scale")),))
  if not cfg.tie_embeddings:
    yield Tensor(HEAD, (Part(("head",)),))


def _experts(
  prefix: str, stack: Path, layer: int, count: int, names: ExpertNames
) -> Iterator[Tensor]:
  """The router and every matrix of every expert of a layer."""
  folder, matrices = _EXPERTS[names]
  prefix += folder
  path: Path = (*stack, "experts")
  router = Part((*path, "router"), layer)
  yield Tensor(f"{prefix}.gate.weight", (router,), transposed=True)
  for expert in range(count):
    for ours, theirs in matrices.items():
      part = Part((*path, ours), layer, expert)
      name = f"{prefix}.experts.{expert}.{theirs}.weight"
      yield Tensor(name, (part,), transposed=True)
