"""What the site generates: fields, results and formulas (extra `docs`)."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from jaxchunk.data.config import DataConfig
from jaxchunk.models.config import ModelConfig
from jaxchunk.training.config import CheckpointConfig, TrainConfig

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def hooks():
  pytest.importorskip("mkdocs", reason="needs the extra `docs`")
  spec = importlib.util.spec_from_file_location(
    "docs_hooks", ROOT / "docs" / "hooks.py"
  )
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  yield module
  module._COPY.cleanup()


@pytest.mark.parametrize(
  "kind", [ModelConfig, DataConfig, TrainConfig, CheckpointConfig]
)
def test_every_field_has_its_meaning(hooks, kind):
  lines = hooks._field_table(kind).splitlines()[2:]
  assert len(lines) == len(dataclasses.fields(kind))
  for field, line in zip(dataclasses.fields(kind), lines, strict=True):
    cells = line.strip("| ").split(" | ")
    assert cells[0] == f"`{field.name}`"
    assert len(cells) == 4 and cells[3].strip(), line


def test_without_results_the_page_says_so(hooks, tmp_path, monkeypatch):
  monkeypatch.setattr(hooks, "_RESULTS", tmp_path / "none")
  assert "No results are stored" in hooks._benchmarks()


def test_results_become_tables(hooks, tmp_path, monkeypatch):
  monkeypatch.setattr(hooks, "_ROOT", tmp_path)
  monkeypatch.setattr(hooks, "_RESULTS", tmp_path)
  line = {
    "benchmark": "speed",
    "ratio": {"over_torch": 1.25},
    "ok": True,
    "device": "cpu",
  }
  (tmp_path / "a.json").write_text(json.dumps(line, indent=2))
  two = [json.dumps(line | {"benchmark": name}) for name in ("b", "c")]
  (tmp_path / "b.jsonl").write_text("\n".join(two))
  page = hooks._benchmarks()
  assert [x for x in page.splitlines() if x.startswith("## ")] == [
    "## speed",
    "## b",
    "## c",
  ]
  assert "<code>ratio.over_torch</code> | <code>1.25</code>" in page
  assert "device cpu (`a.json`)" in page


def test_a_result_of_another_form_is_an_error(hooks, tmp_path, monkeypatch):
  monkeypatch.setattr(hooks, "_RESULTS", tmp_path)
  (tmp_path / "a.json").write_text("[1]")
  with pytest.raises(ValueError, match=r"a\.json: a result is an object"):
    hooks._benchmarks()


def test_formulas_become_mathml(hooks):
  content = (
    '<p>of <span class="arithmatex">\\(x_0 &lt; C\\)</span> tokens</p>'
    '<div class="arithmatex">\\[\n\\mathcal L = \\sum_j a_j\n\\]</div>'
  )
  made = hooks.on_page_content(content, page=None)
  assert made.count("<math") == 2 and made.count('display="block"') == 1
  assert "arithmatex" not in made and "\\" not in made
