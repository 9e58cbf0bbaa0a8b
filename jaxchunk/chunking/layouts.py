"""Whether chunks can run over a layout; else the nearest that they can."""

import dataclasses
import math
from typing import Any

from jaxchunk.chunking.executor import Options
from jaxchunk.chunking.memory import Strategy
from jaxchunk.chunking.routing import has_router_losses
from jaxchunk.chunking.shards import Shards
from jaxchunk.chunking.spaco import SpaCO
from jaxchunk.chunking.staging import Staging
from jaxchunk.models.config import ModelConfig
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.rules import LOGICAL


def check_layout(
  layout: Layout, cfg: ModelConfig, options: Options
) -> Strategy:
  """Whether lanes can run so; the strategy that they run by.

  Raises:
    ValueError: Chunks or heads cannot be dealt out evenly; names a size that
      can.
    NotImplementedError: The layout has stages, or does not go with the
      options.
  """
  if layout.stage > 1:
    near = _changed(layout, stage=1, data=layout.data * layout.stage)
    raise NotImplementedError(
      f"layout.stage={layout.stage}: this does not run over stages; the "
      f"nearest layout is {near}"
    )
  return _check_chunks(layout, cfg, options)


def check_stages(layout: Layout, cfg: ModelConfig, options: Options) -> None:
  """Whether lanes can run over the stages of a layout.

  Raises:
    ValueError: As `check_layout`, or the strategy is another.
    NotImplementedError: As `check_layout`, or routers have losses.
  """
  check_pipeline(layout, cfg, _check_chunks(layout, cfg, options))


def check_pipeline(
  layout: Layout, cfg: ModelConfig, strategy: Strategy | None
) -> None:
  """Whether a model can be cut into the stages of a layout.

  Raises:
    ValueError: It has too few layers, or the strategy is another than
      "chunk_outer".
    NotImplementedError: Its routers have losses.
  """
  if layout.stage == 1:
    return
  if strategy not in (None, "chunk_outer"):
    raise ValueError(
      f"strategy={strategy!r} does not run over layout.stage={layout.stage}: a "
      "stage has all layers of a chunk at once; take strategy='chunk_outer'"
    )
  if has_router_losses(cfg):
    raise NotImplementedError(
      f"layout.stage={layout.stage} with losses of routers, which want all "
      "tokens before the first backward pass; set moe.balance_loss=0 and "
      "moe.z_loss=0, or use the axes 'expert' and 'data'"
    )
  placement = layout.pipeline.placement(layout.stage)
  Staging.of(cfg, placement, layout.pipeline.layers)


def _check_chunks(
  layout: Layout, cfg: ModelConfig, options: Options
) -> Strategy:
  size, devices = options.chunk_size, layout.context
  if size % devices:
    raise ValueError(
      f"chunk_size={size} cannot be dealt out to layout.context={devices} "
      f"devices; take {-(-size // devices) * devices}"
    )
  check_rules(layout)
  check_heads(layout, cfg)
  check_experts(layout, cfg)
  if isinstance(options.strategy, SpaCO):
    raise NotImplementedError(
      f"{options.strategy} runs on one device; leave the layout out, or take "
      "strategy='chunk_outer'"
    )
  if options.kv_memory == "host":
    raise NotImplementedError(
      "kv_memory='host' runs on one device; leave the layout out, or share "
      "sequences by 'context'"
    )
  return options.strategy


def check_heads(layout: Layout, cfg: ModelConfig) -> None:
  """Whether a layout can split a model's heads.

  Raises:
    ValueError: There are too few; names the nearest layout.
    NotImplementedError: They need each other.
  """
  heads, parts = cfg.kv_heads, layout.tensor
  if heads % parts:
    fits = math.gcd(heads, parts)
    context = layout.context * parts // fits
    near = _changed(layout, tensor=fits, context=context)
    raise ValueError(
      f"layout.tensor={parts} does not divide num_kv_heads={heads}; the "
      f"nearest layout is {near}"
    )
  if parts > 1 and cfg.qk_norm and cfg.qk_norm_over != "head":
    raise NotImplementedError(
      f"layout.tensor={parts} with qk_norm_over={cfg.qk_norm_over!r}: its "
      "norm needs all heads of a token; use 'context' or 'fsdp'"
    )


def check_experts(layout: Layout, cfg: ModelConfig) -> None:
  """Whether a layout can split a model's experts.

  Raises:
    ValueError: It cannot, or there are none; names the nearest layout.
  """
  experts = 1 if cfg.moe is None else cfg.moe.num_experts
  fits = math.gcd(experts, layout.expert)
  if fits < layout.expert:
    data = layout.data * layout.expert // fits
    near = _changed(layout, expert=fits, data=data)
    has = "a model without experts" if cfg.moe is None else f"{experts} experts"
    raise ValueError(
      f"layout.expert={layout.expert} cannot split {has}; the nearest layout "
      f"is {near}"
    )


def check_hybrid(layout: Layout, shards: Shards) -> None:
  """Whether groups of a layout may have several sizes in a step.

  Raises:
    ValueError: Parameters are split over them; names the nearest layout.
  """
  if shards.lockstep or layout.fsdp * layout.expert > 1:
    data = layout.data * layout.fsdp * layout.expert
    near = _changed(layout, data=data, fsdp=1, expert=1)
    raise ValueError(
      f"hybrid groups need whole parameters on every device, and {layout} "
      f"splits them; the nearest layout is {near}, with the rules as they are "
      "by default"
    )


def _changed(layout: Layout, **sizes: Any) -> Layout:
  """With other sizes, in one slice."""
  return dataclasses.replace(layout, **sizes, slices=1, slices_over="data")


def check_rules(layout: Layout) -> None:
  """Whether the executor knows what the rules of a layout split.

  Lanes, tokens and layers are split as by default, and what "tensor" and
  "expert" split is what can be used in parts; the width ("embed") may be split
  over whatever lanes and tokens are.

  Raises:
    ValueError: It does not; names the rule and what it may be.
  """
  rules = layout.rules
  allowed = {
    name: {LOGICAL[name]} for name in ("layers", "lane", "sequence", "rank")
  }
  allowed |= {
    "vocab": {("tensor",), (), ("stage", "tensor")},
    "heads": {("tensor",)},
    "kv_heads": {("tensor",)},
    "mlp": {("tensor",), ()},
    "experts": {("expert",)},
  }
  for name, choices in allowed.items():
    if rules[name] not in choices:
      known = [axes[0] if axes else None for axes in sorted(choices)]
      raise ValueError(
        f"rule {name!r} is {rules[name]}, and chunks run with {known}; leave "
        "it out"
      )
  if not set(rules["embed"]) <= {"data", "fsdp", "context"}:
    raise ValueError(
      f"rule 'embed' is {rules['embed']}, and chunks run with some of 'data', "
      "'fsdp' and 'context'"
    )
