"""What F, B and W cost on a device, and what bubble follows from that.

    python benchmarks/pipeline_costs.py --targets=v5e,h200

Compiles F (forward, keeping), B (without gradients of matrices) and W of one
layer of the model for each device, for a chunk with nothing before it, with the
Pallas kernels, and prints the compiler's count of FLOPs. Where the compiler
counts none (GPUs that are not there) the program's matrix products are counted,
and attention's by the keys that queries see: two products forward, seven in the
two kernels of its backward pass. Attention over what
lies before a chunk adds to F and B by formula; from that follow the times of
operations behind 32k and 128k tokens, and the bubble of each schedule where all
microbatches are such chunks. Needs the extra `aot`; runs nothing.
"""

import dataclasses
import json
import math

import jax
from absl import app, flags, logging
from flax import nnx

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.chunking import executor, split
from jaxchunk.chunking.chunk import chunk_of
from jaxchunk.chunking.cost import attention_flops
from jaxchunk.chunking.gradient import abstract_lane
from jaxchunk.chunking.spans import Span
from jaxchunk.models.families import preset
from jaxchunk.sharding.pipeline.simulate import Costs, event_driven, lockstep
from jaxchunk.sharding.pipeline.tables import BUILDERS, build

_TARGETS = flags.DEFINE_list("targets", ["v5e", "h200"], "To compile for.")
_MODEL = flags.DEFINE_string("model", "llama3.2-1b", "A preset.")
_CHUNKS = flags.DEFINE_list("chunks", ["512", "1024"], "Tokens of a chunk.")
_STAGES = flags.DEFINE_integer("stages", 8, "Pipeline stages.")
_COUNT = flags.DEFINE_integer("microbatches", 32, "Chunks in a batch.")


def main(_: list[str]) -> None:
  logging.set_verbosity(logging.WARNING)
  for name in _TARGETS.value:
    for size in map(int, _CHUNKS.value):
      measure(targets.target(name), name, size)


def measure(target: targets.Target, name: str, size: int) -> None:
  """Prints a line for a device and a chunk size, and one for each prefix."""
  cfg = preset(_MODEL.value, dtype="bfloat16", param_dtype="bfloat16").frozen()
  flops = compiled_flops(target, cfg, size)
  spread = max(flops.values()) / min(flops.values())
  where = {"target": name, "model": _MODEL.value, "chunk": size}
  print(json.dumps({**where, "flops": flops, "spread": spread}), flush=True)
  for prefix in (0, 32768, 131072):
    more = attention_flops(cfg, prefix, prefix + size) - attention_flops(
      cfg, 0, size
    )
    more /= cfg.num_layers
    costs = Costs(f=flops["F"] + more, b=flops["B"] + 2.5 * more, w=flops["W"])
    bubbles = {schedule: bubble(schedule, costs) for schedule in BUILDERS}
    line = {**where, "prefix": prefix, "F": costs.f, "B": costs.b, "W": costs.w}
    print(json.dumps({**line, "bubble": bubbles}), flush=True)


def bubble(schedule: str, costs: Costs) -> dict[str, float]:
  table = build(schedule, _STAGES.value, _COUNT.value)
  return {
    "lockstep": round(lockstep(table, costs).bubble, 3),
    "by_events": round(event_driven(table, costs).bubble, 3),
  }


def compiled_flops(
  target: targets.Target, cfg: jc.ModelConfig, size: int
) -> dict[str, float]:
  """FLOPs of the operations on one layer, as the compiler counts them."""
  # Without the head, which is work of its own.
  cfg = dataclasses.replace(cfg, num_layers=1, vocab_size=256).frozen()
  model = nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))
  options = executor.make_options(
    model,
    chunk_size=size,
    strategy="chunk_outer",
    implementation=target.implementation,
  )
  stage, span = options.stage(cfg), Span(0, 0, 1, 0, 1)
  lane, _ = abstract_lane(model, size, size)
  x = jax.ShapeDtypeStruct((1, size, cfg.d_model), cfg.dtype)

  def chunk(model, lane):
    return chunk_of(model, lane, 0, size)

  def forward(model, lane, x):
    here = chunk(model, lane)
    states = stage.init_states(model, 1, size)
    slots = stage.init_slots(model, here, 1)
    return stage.forward_layers(model, span, here, x, states, slots, 0)

  def begin(model, lane, slots):
    owed = split.init_owed(stage, model, chunk(model, lane), slots, 1)
    grads = stage.trainable.zeros(model)
    return owed, grads

  def backward(model, lane, dx, states, slots, owed, grads):
    cotangents = stage.zero_cotangents(states)
    return split.backward_layers(
      stage,
      *(model, span, chunk(model, lane), dx, states, cotangents),
      *(slots, 0, grads, owed, 0),
    )

  def weights(model, lane, slots, owed, grads):
    return split.weight_layers(
      stage, model, span, chunk(model, lane), slots, 0, grads, owed, 0
    )

  with targets.tracing_for(target.device):
    _, states, slots = jax.eval_shape(forward, model, lane, x)
    owed, grads = jax.eval_shape(begin, model, lane, slots)
  programs = {
    "F": (forward, model, lane, x),
    "B": (backward, model, lane, x, states, slots, owed, grads),
    "W": (weights, model, lane, slots, owed, grads),
  }
  passes = {"F": 1.0, "B": 3.5, "W": 0.0}
  found = {}
  for name, (function, *shapes) in programs.items():
    lowered = targets.lower_on(target.device, function, *shapes)
    counted = lowered.compile().cost_analysis()
    if counted is not None:
      found[name] = float(counted["flops"])
      continue
    with targets.tracing_for(target.device):
      jaxpr = jax.make_jaxpr(function)(*shapes)
    attention = passes[name] * attention_flops(cfg, 0, size)
    found[name] = product_flops(jaxpr.jaxpr) + attention
  return found


def product_flops(jaxpr) -> float:
  """Of the matrix products that anything reads, but for those in kernels."""
  from jax.interpreters import partial_eval as pe

  jaxpr, _ = pe.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))
  total = 0.0
  for eqn in jaxpr.eqns:
    if eqn.primitive.name == "dot_general":
      (left, _), _ = eqn.params["dimension_numbers"]
      shape = eqn.invars[0].aval.shape
      summed = math.prod(shape[axis] for axis in left)
      total += 2 * summed * math.prod(eqn.outvars[0].aval.shape)
    elif "pallas" not in eqn.primitive.name and "mosaic" not in str(
      eqn.primitive.name
    ):
      total += sum(product_flops(inner) for inner in inner_jaxprs(eqn.params))
  return total


def inner_jaxprs(params):
  """The programs in a program's operation."""
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      inner = getattr(item, "jaxpr", item)
      if hasattr(inner, "eqns"):
        yield inner


if __name__ == "__main__":
  app.run(main)
