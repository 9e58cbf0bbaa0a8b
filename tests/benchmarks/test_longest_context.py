"""What `benchmarks/longest_context.py` makes of figures; none is compiled."""

import pathlib
import sys

import pytest
from absl import flags

import jaxchunk as jc
from jaxchunk import targets
from jaxchunk.training import fits

sys.path.insert(0, str(pathlib.Path(jc.__file__).parents[1] / "benchmarks"))

import longest_context
from longest_context import Row

if not flags.FLAGS.is_parsed():
  flags.FLAGS.mark_as_parsed()

LIMIT = fits.limit(targets.target("h200"))


class Line:
  """In place of the compiler: so many bytes, and so many a token."""

  def __init__(self, constant, slope, refuse_from=None, update=0):
    self.constant, self.slope = constant, slope
    self.refuse_from, self.update_bytes = refuse_from, update
    self.asked = []

  def lane(self, row, capacity):
    self.asked.append(capacity)
    refused = self.refuse_from is not None and capacity >= self.refuse_from
    need = int(self.constant + self.slope * capacity)
    return fits.Need("lane", need, 0, "too large" if refused else None)

  def update(self, row):
    return fits.Need("update", self.update_bytes, 0)


def row(model="8B", training="full", way="layer_outer", chunk=2048):
  return Row("h200", model, training, chunk, way)


# The formula says 282,624 bytes a token; compilers need less, or more.
@pytest.mark.parametrize("slope", [150_000, 280_000, 400_000])
@pytest.mark.parametrize("refuse_from", [None, 2**18])
def test_the_limit_is_on_the_line(slope, refuse_from):
  line = Line(60 * 2**30, slope, refuse_from)
  found = longest_context.measure(row(), line)
  exact = (LIMIT - 60 * 2**30) / slope
  assert found["tokens"] == pytest.approx(exact, abs=2)
  powers = 2 ** (int(exact).bit_length() - 1)
  if refuse_from is not None:
    powers = min(powers, refuse_from // 2)
  assert found["in_powers"] == powers and powers in line.asked
  assert found["bytes_per_token"] == pytest.approx(slope)


def test_the_host_limits_what_is_there():
  line = Line(60 * 2**30, 0)
  found = longest_context.measure(row(way="kv on host"), line)
  assert found["tokens"] == 128 * 2**30 // 393_216
  assert found["in_powers"] == 2**18 and 2**18 in line.asked
  # The moments are there too: a byte a number and the scales, twice.
  less = longest_context.measure(
    row(training="full, moments on host", way="kv on host"), line
  )
  assert less["tokens"] / found["tokens"] == pytest.approx(0.881, abs=1e-3)


def test_what_does_not_fit_says_why():
  line = Line(0, 0)
  found = longest_context.measure(row(model="32B"), line)
  assert "state alone" in found["why_not"] and not line.asked
  found = longest_context.measure(row(), Line(0, 0, update=LIMIT + 1))
  assert "update" in found["why_not"]
  found = longest_context.measure(row(), Line(LIMIT, 1))
  assert "16,384 tokens" in found["why_not"]
