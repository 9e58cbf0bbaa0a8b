"""Plans: order, what was compiled, what to change, and how it is told."""

import dataclasses
import itertools
import json
import re

import pytest

from jaxchunk.planner import plan as planner
from jaxchunk.planner import report
from jaxchunk.planner.candidates import Candidate
from jaxchunk.planner.compiled import Compiler
from jaxchunk.planner.plan import NothingFits, make_plan, smallest
from jaxchunk.planner.requests import read_request
from jaxchunk.sharding.mesh import Layout
from jaxchunk.training.config import Config, TrainConfig
from jaxchunk.training.fits import Need

GIB = 2**30


def test_the_fastest_that_fits_comes_first(make_request):
  request = make_request(memory_limit=4 * GIB)
  plan = make_plan(request)
  assert plan.weighed == 48 > len(plan.choices) > 0
  # Of two within a percent the one that needs less comes first.
  for one, next_ in itertools.pairwise(plan.choices):
    assert next_.step.seconds > 0.989 * one.step.seconds
    close = abs(next_.step.seconds / one.step.seconds - 1) < 1e-3
    on_host = [x.candidate.kv_memory == "host" for x in (one, next_)]
    if close and on_host[0] == on_host[1]:
      assert next_.predicted.peak >= one.predicted.peak
  assert all(c.predicted.peak <= 4 * GIB for c in plan.choices)
  assert plan.best == plan.choices[0]
  # With more room more fit, and the best is no slower.
  wide = make_plan(dataclasses.replace(request, memory_limit=8 * GIB))
  assert len(wide.choices) > len(plan.choices)
  assert wide.best.step.seconds <= 1.01 * plan.best.step.seconds


def test_what_does_not_fit_compiled_is_passed_over(make_request, monkeypatch):
  asked = []

  def needs(self, candidate):
    asked.append(candidate)
    size = 9 * GIB if len(asked) <= 2 else 3 * GIB
    return {"lane": Need("lane", size, 0, peak=size)}

  monkeypatch.setattr(Compiler, "needs", needs)
  plan = make_plan(make_request(memory_limit=8 * GIB), compile_best=2)
  assert len(asked) == 4
  assert [c.candidate for c in plan.refused] == asked[:2]
  assert plan.best.candidate == asked[2]
  assert plan.best.compiled_peak == 3 * GIB
  told = report.table(plan)
  assert told.count("9.00") == 2 and "do not" in told
  assert not {c.candidate for c in plan.choices} & set(asked[:2])


def test_programs_that_candidates_share_are_compiled_once(
  make_request, monkeypatch
):
  counts = {"lane": 0, "update": 0, "sums": 0, "evaluation": 0}

  def counted(name):
    def need(*_):
      counts[name] += 1
      return Need(name, 1, 0, peak=1)

    return need

  for name in counts:
    monkeypatch.setattr(f"jaxchunk.training.fits.{name}_need", counted(name))
  compiler = Compiler(make_request("h200:4"), lambda _: None)
  one = Candidate(
    layout=Layout(fsdp=4), strategy="chunk_outer", chunk_size=2048
  )
  for candidate in (one, dataclasses.replace(one, live_chunks=2), one):
    assert set(compiler.needs(candidate)) == set(counts)
  assert counts == {"lane": 2, "update": 1, "sums": 1, "evaluation": 1}
  staged = dataclasses.replace(one, layout=Layout(stage=4), schedule="1f1b")
  # Their loss is that of the gradient's program.
  assert set(compiler.needs(staged)) == {"lane", "update", "sums"}


def test_when_nothing_fits_it_says_what_to_change(make_request):
  request = make_request(memory_limit=GIB, lengths=(131072,))
  candidate, least = smallest(request)
  with pytest.raises(NothingFits) as error:
    make_plan(request)
  found = error.value
  assert (found.smallest, found.need) == (candidate, least)
  text = str(found)
  assert f"{least / GIB:.2f} GiB" in text and "1.00 GiB" in text
  assert "--trainable=lora" in text and "devices in place of 1" in text
  # Each of them is true.
  for remedy in found.remedies:
    assert remedy.need <= GIB
  more = re.search(r"(\d+) devices in place of 1", text)
  enough, half = (
    dataclasses.replace(
      request, machine=dataclasses.replace(request.machine, count=count)
    )
    for count in (int(more[1]), int(more[1]) // 2)
  )
  assert smallest(enough)[1] <= GIB < smallest(half)[1]


def test_shorter_sequences_are_a_remedy_where_their_state_is_large(
  make_request,
):
  request = make_request("v5e:2x2", lengths=(2048, 2**23), memory_limit=3 * GIB)
  changes = [r.change for r in planner.remedies(request)]
  assert any(c.startswith("sequences up to") for c in changes)


def test_the_report_tells_how_to_run_it(make_request):
  plan = make_plan(make_request("h200:4", batch_tokens=65536))
  text = report.text(plan, 5)
  best = plan.best
  assert str(best.candidate) in text
  assert f"{best.predicted.peak / GIB:.2f}" in text
  assert "not measured" in text
  flags = report.flags_of(plan.request, best.candidate)
  for flag in flags:
    assert flag in text
    section, field = re.match(r"--config\.(\w+)\.(\w+)=", flag).groups()
    owner = {f.name: f for f in dataclasses.fields(Config)}[section]
    assert field in {f.name for f in dataclasses.fields(owner.type)}
  assert f"--config.train.chunk_size={best.candidate.chunk_size}" in flags


def test_a_plan_as_values(make_request):
  plan = make_plan(make_request("h200:4"))
  values = json.loads(json.dumps(report.as_json(plan, 3)))
  assert len(values["choices"]) == 3
  assert values["best"]["predicted_bytes"]["lane"] > 0
  assert values["best"]["compiled_bytes"] is None
  assert values["limit_bytes"] == plan.request.limit


def test_requests_from_words(tmp_path):
  request = read_request(
    model="llama3.2-1b",
    lengths="4096:3",
    target="v5e:2x2",
    trainable="lora",
    memory_gib=2.5,
    optimizer="adamw8bit",
    optimizer_memory=None,
  )
  assert request.model.lora is not None
  assert request.model.dtype == request.model.param_dtype == "bfloat16"
  assert request.limit == 2.5 * GIB
  assert request.train == TrainConfig(optimizer="adamw8bit")
  path = tmp_path / "mine.py"
  path.write_text(
    "from jaxchunk.data.config import DataConfig\n"
    "from jaxchunk.models.families import preset\n"
    "from jaxchunk.training.config import Config, TrainConfig\n"
    "def get_config(layers='3'):\n"
    "  model = preset('llama3.2-1b', num_layers=int(layers))\n"
    "  train = TrainConfig(optimizer='muon')\n"
    "  return Config(model=model, data=DataConfig(), train=train)\n"
  )
  request = read_request(model=f"{path}:5", lengths="4096", target="h200")
  assert request.model.num_layers == 5
  assert request.train.optimizer == "muon"
  with pytest.raises(ValueError, match="no such file"):
    read_request(model="none.py", lengths="1", target="h200")
  with pytest.raises(ValueError, match=r"no preset 'llama'"):
    read_request(model="llama", lengths="1", target="h200")
  with pytest.raises(ValueError, match=r"train.optimizer='sgd' must be"):
    read_request(
      model="llama3.2-1b", lengths="1", target="h200", optimizer="sgd"
    )
