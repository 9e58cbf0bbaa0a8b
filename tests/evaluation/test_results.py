"""The file of results, and the pictures that are drawn from it."""

import itertools
import json

import numpy as np
import pytest

from jaxchunk.evaluation import pictures, results
from jaxchunk.evaluation.bits_per_byte import Scored, bits_per_byte
from jaxchunk.evaluation.results import Results, ResultsError
from jaxchunk.evaluation.scoring import Cell

DEPTHS = (0.0, 0.5, 1.0)


def make_cell(task, length, depth=None, share=0.5):
  return Cell(
    task=task,
    length=length,
    depth=depth,
    samples=4,
    tokens=length - 1.0,
    ranked_first=share,
    exact_match=0.0,
    chance=0.125,
    logprob=-3.0,
    extrapolated=length > 2000,
  )


@pytest.fixture
def found():
  rng = np.random.default_rng(0)
  documents = [
    Scored(rng.random(n), rng.integers(0, 4, n)) for n in (30, 700, 900, 5000)
  ]
  cells = [
    make_cell("needle", length, depth, share=depth)
    for length in (1024, 4096)
    for depth in DEPTHS
  ]
  cells += [make_cell("common_words", n) for n in (1024, 4096)]
  return Results("a run", {"step": 3}, bits_per_byte(documents), cells)


@pytest.mark.fast
@pytest.mark.parametrize("losses", [True, False])
def test_round_trip(found, losses, tmp_path):
  if not losses:
    found = Results(found.title, found.about, None, [])
  path = tmp_path / "new" / results.FILE_NAME
  results.write(path, found)
  assert results.read(path) == found
  assert json.loads(path.read_text())["format"] == results.FORMAT


def damaged(values):
  del values["cells"][0]["depth"]
  return values


BAD_FILES = {
  "missing": (None, "cannot be read.*scripts/evaluate.py"),
  "no json": ("{", "is not JSON"),
  "no results": ("[1]", "no field 'format'"),
  "other version": (
    lambda values: {**values, "format": 99},
    "has format 99 and this version of jaxchunk reads format 1.*again",
  ),
  "damaged": (damaged, "is damaged.*depth"),
  "too few fields": ({"format": 1}, "is damaged"),
}


@pytest.mark.fast
@pytest.mark.parametrize("case", BAD_FILES)
def test_a_file_that_cannot_be_used_is_an_error(case, found, tmp_path):
  content, message = BAD_FILES[case]
  path = tmp_path / results.FILE_NAME
  if callable(content):
    results.write(path, found)
    content = content(json.loads(path.read_text()))
  if content is not None:
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
  with pytest.raises(ResultsError, match=message):
    results.read(path)


@pytest.mark.fast
def test_heat_map_shows_each_cell_at_its_place(found):
  figure = dict(pictures.figures(found))["needle"]
  image = figure.axes[0].images[0].get_array()
  np.testing.assert_allclose(image, [[0, 0], [0.5, 0.5], [1, 1]])
  labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
  assert labels == ["1k", "4k*"]
  texts = [text.get_text() for text in figure.axes[0].texts]
  assert texts == ["0%", "0%", "50%", "50%", "100%", "100%"]


@pytest.mark.fast
def test_losses_by_both_leave_what_is_not_there_blank(found):
  figure = dict(pictures.figures(found))["bits_per_byte"]
  image = figure.axes[1].images[0].get_array()
  by_both = found.bits_per_byte.by_both
  assert image.shape == np.shape(by_both)
  missing = sum(value is None for line in by_both for value in line)
  assert missing > 0
  assert len(figure.axes[1].texts) == image.size - missing


def test_pictures_are_drawn_without_overlap(found, tmp_path):
  paths = pictures.draw(found, tmp_path)
  assert [path.name for path in paths] == [
    "bits_per_byte.png",
    "needle.png",
    "tasks.png",
  ]
  assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)
  for _, figure in pictures.figures(found):
    figure.canvas.draw()
    for axes in figure.axes:
      ticks = [t for t in axes.get_xticklabels() if t.get_text()]
      boxes = [t.get_window_extent() for t in ticks if not t.get_rotation()]
      inside = [b for b in boxes if axes.bbox.x0 - 9 < b.x0 < axes.bbox.x1]
      for left, right in itertools.pairwise(inside):
        assert left.x1 <= right.x0
