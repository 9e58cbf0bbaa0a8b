"""Parameters under the names and shapes that transformers gives them.

Arrays only: neither torch nor transformers is needed.
"""

from collections.abc import Iterator, Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Num

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.transformer import Transformer

_LLAMA_NORMS = {
  "attention_norm": "input_layernorm",
  "mlp_norm": "post_attention_layernorm",
}
_GEMMA2_NORMS = {
  "attention_norm": "input_layernorm",
  "attention_post_norm": "post_attention_layernorm",
  "mlp_norm": "pre_feedforward_layernorm",
  "mlp_post_norm": "post_feedforward_layernorm",
}
_QK_NORMS = {"q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_LINEARS = {
  "q": "self_attn.q_proj",
  "k": "self_attn.k_proj",
  "v": "self_attn.v_proj",
  "o": "self_attn.o_proj",
  "gate": "mlp.gate_proj",
  "up": "mlp.up_proj",
  "down": "mlp.down_proj",
}

Arrays = dict[str, Num[np.ndarray, "..."]]


def to_hugging_face(model: Transformer) -> Arrays:
  """The parameters as `LlamaForCausalLM` and its kin name and shape them.

  Args:
    model: The model.

  Returns:
    Arrays on the host by name. Layers are apart and matrices `[out, in]`; a
    tied head is not there.
  """
  arrays: Arrays = {}
  for param, names, transposed in _pairs(model):
    ours = np.asarray(param[...])
    layers = [ours] if isinstance(names, str) else list(ours)
    for name, array in zip(_listed(names), layers, strict=True):
      arrays[name] = array.T if transposed else array
  return arrays


def from_hugging_face(
  arrays: Mapping[str, Num[np.ndarray, "..."]], cfg: ModelConfig
) -> Transformer:
  """A model of the configuration with such parameters, or their gradients.

  Args:
    arrays: By name, as `to_hugging_face` gives them.
    cfg: What they are the parameters of.

  Returns:
    The model, its arrays in `cfg.param_dtype`.

  Raises:
    ValueError: A name is missing or left over, or a shape is not that of the
      configuration.
  """
  model = Transformer(cfg, rngs=nnx.Rngs(0))
  left = dict(arrays)
  for param, names, transposed in _pairs(model):
    shape = param.shape if isinstance(names, str) else param.shape[1:]
    wanted = shape[::-1] if transposed else shape
    layers = []
    for name in _listed(names):
      if name not in left:
        raise ValueError(
          f"the weights lack {name!r}, which the configuration asks for"
        )
      array = np.asarray(left.pop(name))
      if array.shape != wanted:
        raise ValueError(
          f"{name!r} has shape {array.shape}, the configuration {wanted}"
        )
      layers.append(array.T if transposed else array)
    whole = layers[0] if isinstance(names, str) else np.stack(layers)
    param[...] = jnp.asarray(whole, param.dtype)
  if left:
    raise ValueError(
      f"the configuration has no place for the weights {sorted(left)}"
    )
  return model


def _pairs(
  model: Transformer,
) -> Iterator[tuple[nnx.Param, str | list[str], bool]]:
  """Each parameter, its name or those of its layers, and if it is transposed.

  Transposed are matrices of layers: `[in, out]` here, `[out, in]` there.
  """
  cfg = model.cfg
  yield model.embed, "model.embed_tokens.weight", False
  yield model.final_norm.scale, "model.norm.weight", False
  if model.head is not None:
    yield model.head, "lm_head.weight", False
  norms = _GEMMA2_NORMS if cfg.post_norms else _LLAMA_NORMS
  if cfg.qk_norm:
    norms = norms | _QK_NORMS
  period = len(model.blocks)
  for position, block in enumerate(model.blocks):
    layers = range(position, cfg.num_layers, period)

    def named(name: str, layers: range = layers) -> list[str]:
      return [f"model.layers.{i}.{name}" for i in layers]

    for mine, theirs in norms.items():
      yield getattr(block, mine).scale, named(f"{theirs}.weight"), False
    for mine, theirs in _LINEARS.items():
      linear = getattr(block, mine)
      yield linear.kernel, named(f"{theirs}.weight"), True
      if linear.bias is not None:
        yield linear.bias, named(f"{theirs}.bias"), False


def _listed(names: str | list[str]) -> list[str]:
  return [names] if isinstance(names, str) else names
