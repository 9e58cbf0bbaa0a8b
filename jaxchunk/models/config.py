"""What a decoder of the family looks like: typed, and frozen once in use."""

import dataclasses
import typing
from typing import Any, Literal

from jaxchunk.models.lora import LoRA
from jaxchunk.models.moe import MoE
from jaxchunk.models.quantized import Quantization
from jaxchunk.models.rope import Rope

HeadNorm = Literal["head", "all"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
DType = Literal["float32", "bfloat16", "float16", "float64"]


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
  """Shape and variant of a decoder-only transformer.

  Fields may be set until a model takes its frozen copy (`frozen`); a frozen
  configuration is hashable and refuses to change, because compiled programs
  depend on it.

  Attributes:
    vocab_size: V, the number of token ids.
    d_model: D, the width of the residual stream.
    num_layers: L.
    num_heads: N, query heads.
    num_kv_heads: K, key/value heads; divides N. `None` means N.
    head_dim: H, even. `None` means D / N.
    d_ff: F, the width inside the gated MLP; with `moe` of nothing.
    moe: Experts in place of the MLP; see `jaxchunk.models.moe.MoE`.
    window_pattern: Attention window of each layer, repeated over the layers;
      `None` in it is full attention. `(4096, None)` alternates.
    rope: Rotary embedding of full-attention layers.
    local_rope: That of window layers; `None` means the same.
    activation: Of the MLP's gate.
    qk_norm: RMSNorm on q and k.
    qk_norm_over: Whether that is over each "head", or over "all" heads of q,
      and of k, together.
    attention_softcap: Cap on attention scores.
    logit_softcap: Cap on logits.
    attention_scale: Factor on attention scores; `None` means H ** -0.5.
    tie_embeddings: The head is the embedding.
    qkv_bias: Biases on q, k and v.
    pre_norms: RMSNorm on the input of attention and MLP.
    post_norms: RMSNorm on their output.
    unit_offset_norm: Norms multiply by 1 + scale.
    scale_embeddings: Embeddings are multiplied by D ** 0.5.
    norm_eps: Added to the mean square in norms.
    context_length: Longest sequence that the model was made for, in tokens;
      `None` where nobody says.
    lora: Adapters beside the matrices of the layers; see
      `jaxchunk.models.adapters.add_lora`.
    quantization: Hold the matrices of the layers in four or eight bits; they
      cannot be trained, adapters beside them can. `None` holds them in
      `param_dtype`.
    dropout: Rate on the output of attention and MLP, in training only.
    dtype: Of activations and matrix products.
    param_dtype: Of parameters.
  """

  vocab_size: int
  d_model: int
  num_layers: int
  num_heads: int
  num_kv_heads: int | None = None
  head_dim: int | None = None
  d_ff: int
  moe: MoE | None = None
  window_pattern: tuple[int | None, ...] = (None,)
  rope: Rope = dataclasses.field(default_factory=Rope)
  local_rope: Rope | None = None
  activation: Activation = "silu"
  qk_norm: bool = False
  qk_norm_over: HeadNorm = "head"
  attention_softcap: float | None = None
  logit_softcap: float | None = None
  attention_scale: float | None = None
  tie_embeddings: bool = False
  qkv_bias: bool = False
  pre_norms: bool = True
  post_norms: bool = False
  unit_offset_norm: bool = False
  scale_embeddings: bool = False
  norm_eps: float = 1e-6
  context_length: int | None = None
  lora: LoRA | None = None
  quantization: Quantization | None = None
  dropout: float = 0.0
  dtype: DType = "float32"
  param_dtype: DType = "float32"

  def __setattr__(self, name: str, value: Any) -> None:
    if self.__dict__.get("_is_frozen"):
      raise dataclasses.FrozenInstanceError(
        f"cannot set {name}: a model uses this configuration. Change a copy, "
        "dataclasses.replace(cfg, ...), and build a model from it"
      )
    object.__setattr__(self, name, value)

  def __hash__(self) -> int:
    if not self.__dict__.get("_is_frozen"):
      raise TypeError("only a frozen ModelConfig is hashable; call .frozen()")
    return hash(
      tuple(getattr(self, field.name) for field in dataclasses.fields(self))
    )

  def frozen(self) -> "ModelConfig":
    """A checked copy that no longer changes, with every default filled in.

    Raises:
      ValueError: As `validate`.
    """
    self.validate()
    copy = dataclasses.replace(
      self,
      num_kv_heads=self.kv_heads,
      head_dim=self.head_width,
      window_pattern=tuple(self.window_pattern),
    )
    copy.__dict__["_is_frozen"] = True
    return copy

  @property
  def kv_heads(self) -> int:
    """K."""
    return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

  @property
  def head_width(self) -> int:
    """H."""
    if self.head_dim is None:
      return self.d_model // self.num_heads
    return self.head_dim

  @property
  def score_scale(self) -> float:
    """Factor on attention scores."""
    if self.attention_scale is None:
      return self.head_width**-0.5
    return self.attention_scale

  @property
  def mlp_width(self) -> int:
    """F of the MLP that all tokens go through; 0 if there is none."""
    return self.d_ff if self.moe is None else self.moe.shared_d_ff

  @property
  def active_width(self) -> int:
    """F of all that a token goes through: the MLP and its experts."""
    if self.moe is None:
      return self.d_ff
    return self.mlp_width + self.moe.experts_per_token * self.moe.d_ff

  def rope_of(self, window: int | None) -> Rope:
    """The rotary embedding of a layer with this window."""
    if window is None or self.local_rope is None:
      return self.rope
    return self.local_rope

  def layers_of(self, position: int) -> int:
    """How many layers sit at a position of the window pattern."""
    period = len(self.window_pattern)
    return (self.num_layers + period - 1 - position) // period

  def validate(self) -> None:
    """Checks every field.

    Raises:
      ValueError: A field is impossible; names it, its value and the remedy.
    """
    for name in ("vocab_size", "d_model", "num_layers", "num_heads", "d_ff"):
      _check_positive(name, getattr(self, name))
    _check_positive("num_kv_heads", self.kv_heads)
    if self.num_heads % self.kv_heads:
      raise ValueError(
        f"num_heads={self.num_heads} is not a multiple of "
        f"num_kv_heads={self.kv_heads}; choose a divisor of num_heads"
      )
    if self.head_dim is None and self.d_model % self.num_heads:
      raise ValueError(
        f"d_model={self.d_model} is not a multiple of "
        f"num_heads={self.num_heads}; set head_dim"
      )
    _check_positive("head_dim", self.head_width)
    if self.head_width % 2:
      raise ValueError(
        f"head_dim={self.head_width} must be even: rotary embeddings turn "
        "pairs of channels"
      )
    for name in ("rope", "local_rope"):
      self._check_rope(name)
    self._check_window_pattern()
    for name in ("attention_softcap", "logit_softcap", "attention_scale"):
      value = getattr(self, name)
      if value is not None and not value > 0:
        raise ValueError(f"{name}={value} must be positive, or None")
    if not (self.pre_norms or self.post_norms):
      raise ValueError(
        "pre_norms and post_norms are both off; a layer needs one of them"
      )
    if self.context_length is not None:
      _check_positive("context_length", self.context_length)
    if not isinstance(self.lora, LoRA | None):
      raise ValueError(f"lora={self.lora!r} must be a LoRA, or None")
    self._check_quantization()
    self._check_moe()
    if not self.norm_eps > 0:
      raise ValueError(f"norm_eps={self.norm_eps} must be positive")
    if not 0 <= self.dropout < 1:
      raise ValueError(f"dropout={self.dropout} must be in [0, 1)")
    for name, kind in (
      ("qk_norm_over", HeadNorm),
      ("activation", Activation),
      ("dtype", DType),
      ("param_dtype", DType),
    ):
      if getattr(self, name) not in typing.get_args(kind):
        raise ValueError(
          f"{name}={getattr(self, name)!r} is not one of "
          f"{list(typing.get_args(kind))}"
        )

  def _check_rope(self, name: str) -> None:
    rope = getattr(self, name)
    if name == "local_rope" and rope is None:
      return
    if not isinstance(rope, Rope):
      other = ", or None" if name == "local_rope" else ""
      raise ValueError(f"{name}={rope!r} must be a Rope{other}")
    rope.check(self.head_width, name)

  def _check_quantization(self) -> None:
    quantization = self.quantization
    if not isinstance(quantization, Quantization | None):
      raise ValueError(
        f"quantization={quantization!r} must be a Quantization, or None"
      )
    if quantization is None:
      return
    heads = self.num_heads * self.head_width
    for name, inputs in (
      ("d_model", self.d_model),
      ("num_heads * head_dim", heads),
      ("d_ff", self.d_ff),
    ):
      if inputs % quantization.block:
        raise ValueError(
          f"{name}={inputs} is not a multiple of "
          f"quantization.block={quantization.block}; choose a divisor"
        )

  def _check_moe(self) -> None:
    if not isinstance(self.moe, MoE | None):
      raise ValueError(f"moe={self.moe!r} must be a MoE, or None")
    if self.moe is None:
      return
    if self.quantization is not None:
      raise ValueError(
        f"quantization={self.quantization} with moe={self.moe}: experts "
        "cannot be held quantized; set quantization=None"
      )
    beside = {"gate", "up", "down"} & set(
      self.lora.targets if self.lora else ()
    )
    if beside:
      raise ValueError(
        f"lora.targets has {sorted(beside)} with moe={self.moe}: experts "
        "cannot have adapters; set lora.targets=('q', 'k', 'v', 'o')"
      )

  def _check_window_pattern(self) -> None:
    if not self.window_pattern:
      raise ValueError("window_pattern is empty; (None,) is full attention")
    if len(self.window_pattern) > self.num_layers:
      raise ValueError(
        f"window_pattern has {len(self.window_pattern)} entries but there are "
        f"num_layers={self.num_layers}; shorten the pattern"
      )
    for window in self.window_pattern:
      if window is not None:
        _check_positive("window_pattern entry", window)


def _check_positive(name: str, value: Any) -> None:
  if not isinstance(value, int) or value < 1:
    raise ValueError(f"{name}={value!r} must be a positive integer")
