"""Memory by formula against the compiler's account, program by program."""

import dataclasses

import pytest

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.lora import LoRA
from jaxchunk.planner.candidates import Candidate, Request
from jaxchunk.planner.compiled import Compiler
from jaxchunk.planner.devices import machine
from jaxchunk.planner.lengths import lengths_of
from jaxchunk.planner.memory import Memory
from jaxchunk.planner.plan import make_plan
from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.pipeline.tables import Pipeline
from jaxchunk.sharding.rules import Rules
from jaxchunk.training.config import TrainConfig

CFG = ModelConfig(
  vocab_size=32768,
  d_model=1024,
  num_layers=8,
  num_heads=8,
  num_kv_heads=4,
  head_dim=128,
  d_ff=4096,
  dtype="bfloat16",
  param_dtype="bfloat16",
)
OVER = Rules({"embed": ("fsdp", "context")})
CHUNK = Candidate(layout=Layout(), strategy="chunk_outer", chunk_size=2048)
LAYER = dataclasses.replace(CHUNK, strategy="layer_outer")
STAGED = dataclasses.replace(
  CHUNK,
  layout=Layout(
    stage=4,
    rules=Rules({"vocab": ("stage", "tensor")}),
    pipeline=Pipeline(schedule="v_half"),
  ),
  schedule="v_half",
)


def asked(target, longest, cfg=CFG, **train):
  train = TrainConfig(eval_every=0, **train)
  lengths = lengths_of([2048, longest])
  return Request(cfg.frozen(), lengths, machine(target), train)


@pytest.mark.parametrize(
  ("target", "longest", "candidate"),
  [
    ("h200", 65536, dataclasses.replace(CHUNK, live_chunks=4)),
    ("h200", 65536, LAYER),
    ("h200:4", 65536, dataclasses.replace(LAYER, layout=Layout(fsdp=4))),
    ("v5e", 65536, LAYER),
    (
      "v5e:2x2",
      65536,
      dataclasses.replace(CHUNK, layout=Layout(fsdp=2, context=2, rules=OVER)),
    ),
    ("v5e:2x2", 65536, STAGED),
  ],
  ids=str,
)
def test_the_peak_is_within_a_tenth(target, longest, candidate):
  request = asked(target, longest)
  needs = Compiler(request, print).needs(candidate)
  peak = max(need.peak for need in needs.values())
  predicted = Memory(request).predict(candidate)
  assert set(predicted.programs) == set(needs)
  assert predicted.peak == pytest.approx(peak, rel=0.1)


def test_the_peak_of_adapters_is_within_a_tenth():
  cfg = dataclasses.replace(CFG, lora=LoRA(rank=16))
  request = asked("h200", 65536, cfg)
  needs = Compiler(request, print).needs(CHUNK)
  peak = max(need.peak for need in needs.values())
  assert Memory(request).predict(CHUNK).peak == pytest.approx(peak, rel=0.1)


def test_a_plan_is_compiled_and_fits():
  cfg = dataclasses.replace(CFG, num_layers=2)
  request = dataclasses.replace(asked("h200:4", 32768, cfg), memory_limit=2**30)
  plan = make_plan(request, compile_best=1)
  assert plan.best.compiled_peak <= 2**30
  assert plan.best.predicted.peak == pytest.approx(
    plan.best.compiled_peak, rel=0.1
  )
