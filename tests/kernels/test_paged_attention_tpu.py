"""The TPU kernel of paged attention: what it reads, its limits, lowering."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from jaxchunk.kernels.attention.api import grouped, ungrouped
from jaxchunk.kernels.paged_attention.pages import KVPages, PageView
from jaxchunk.kernels.paged_attention.pallas_tpu import tpu_paged_forward
from jaxchunk.kernels.paged_attention.tpu import work
from jaxchunk.kernels.paged_attention.tpu.work import TpuSteps, unsupported
from tests.kernels.test_paged_attention import (
  CHEAP,
  Problem,
  assert_near,
  draw,
  truth,
)


def run(problem, *, sizes, interpret=True, **options):
  @functools.partial(jax.jit, compiler_options=CHEAP)
  def attend(problem):
    q, *rest = problem
    o, lse = tpu_paged_forward(
      grouped(q, problem.pages.k.shape[1]),
      *rest,
      scale=q.shape[-1] ** -0.5,
      sizes=sizes,
      interpret=interpret,
      **options,
    )
    return ungrouped(o), ungrouped(lse[..., None])[..., 0]

  return attend(problem)


# Of `draw`, and the sizes of a step.
SHAPES = {
  # Steps in which everything is visible, and several blocks of queries.
  "prefill": (
    {"lengths": [[40, 44], [7, 30]], "T": 21},
    {"keys": 8, "queries": 12},
  ),
  "turned": (
    {"lengths": [[300, 129], [0, 256]], "Z": 128, "pages": "int8"},
    {"keys": 256},
  ),
  "turned, with holes": (
    {"lengths": [[300, 129]], "T": 3, "Z": 128, "log_weights": True},
    {"keys": 256},
  ),
  "in place": (
    {"lengths": [[300], [130]], "K": 1, "Z": 128, "H": 128}
    | {"pages": "int8", "positions": True},
    {"keys": 128},
  ),
  "sizes of the table": (
    {"lengths": [[900, 20]], "Z": 64, "H": 128, "log_weights": True},
    {},
  ),
}


@pytest.mark.parametrize("case", SHAPES)
def test_outputs_are_true(case):
  arguments, sizes = SHAPES[case]
  problem = draw(**arguments)
  if case == "in place":
    pad = -problem.pages.k.shape[2] % 8
    pages = jax.tree.map(
      lambda a: np.pad(
        a, ((0, 0), (0, 0), (0, pad), *((0, 0),) * (a.ndim - 3))
      ),
      problem.pages,
    )
    problem = problem._replace(pages=pages)
  options = {"window": 200, "layer": 1}
  got = run(problem, sizes=TpuSteps(**sizes), **options)
  assert_near(got, truth(problem, **options))


def test_no_races_and_nothing_read_before_it_is_written(capfd):
  # Four rows a core, of an odd number of steps and of none, first and last.
  lengths = [[9, 13], [0, 1], [6, 0], [17, 8]]
  problem = draw(lengths, T=3, pages="float8_e4m3fn")
  # Memory that was not written holds NaN.
  params = pltpu.InterpretParams(
    detect_races=True, num_cores_or_threads=2, uninitialized_memory="nan"
  )
  got = run(problem, sizes=TpuSteps(8, 8), interpret=params)
  jax.block_until_ready(got)
  # The interpreter reports a race by printing it.
  assert "RACE" not in "".join(capfd.readouterr())
  assert_near(got, truth(problem))


@pytest.mark.fast
@pytest.mark.parametrize(
  "window, ordered", [(None, True), (9, True), (9, False)]
)
def test_only_pages_that_are_seen_are_read(window, ordered):
  lengths = np.asarray([[40, 13], [40, 0], [3, 40]], np.int32)
  position = np.asarray([[[-1, 20]], [[39, 37]], [[-1, -1]]], np.int32)
  form = work.Form(
    heads=(2, 1),
    queries=2,
    blocks=1,
    rows=6,
    page=4,
    step=2,
    pages=99,
    turned=False,
    beside=(),
    window=window,
    scale=1.0,
    softcap=None,
    dtype=jnp.float32,
  )
  view = PageView(jnp.zeros((3, 2, 10), jnp.int32), jnp.asarray(lengths))
  words = work.row_words(form, view, jnp.asarray(position), ordered)
  words = np.asarray(words).reshape(-1, 6)
  # Behind the last row stands an empty one.
  assert (words[6] == 0).all()
  start, count, before = words[:6, :3].T
  if not ordered:
    np.testing.assert_array_equal(start, 0)
    np.testing.assert_array_equal(count, [10, 4, 10, 0, 0, 0])
  elif window is None:
    # To the page of position 20, and to that of 39.
    np.testing.assert_array_equal(start, 0)
    np.testing.assert_array_equal(count, [6, 4, 10, 0, 0, 0])
  else:
    # From the page of position 12, and from that of 29.
    np.testing.assert_array_equal(start[:3], [3, 3, 7])
    np.testing.assert_array_equal(count, [3, 1, 3, 0, 0, 0])
  steps = -(-count // 2)
  np.testing.assert_array_equal(before, np.cumsum(steps) - steps)


def _shapes(T=1, G=4, H=128, Z=64, M=32, B=2, dtype=jnp.bfloat16, pages=None):
  array = jax.ShapeDtypeStruct
  K, N = 2, 64
  kv = array((2, K, N, Z, H), pages or dtype)
  scale = None if pages is None else array(kv.shape[:4], jnp.float32)
  view = PageView(array((B, K, M), jnp.int32), array((B, K), jnp.int32))
  cache = KVPages(kv, kv, scale, scale)
  q = array((B, K, G, T, H), dtype)
  return Problem(q, cache, view, array((B, T), jnp.int32))


@pytest.mark.fast
@pytest.mark.parametrize(
  "shapes",
  [
    {},
    {"T": 256, "dtype": jnp.float32},
    {"H": 64, "Z": 128},
    {"H": 256, "Z": 16},
    {"pages": jnp.int8},
    {"pages": jnp.float8_e5m2, "T": 3},
  ],
)
def test_it_lowers_for_tpu(shapes):
  problem = _shapes(**shapes)
  assert unsupported(*problem[:3]) is None
  attend = functools.partial(tpu_paged_forward, scale=0.1, window=70)
  traced = jax.jit(attend).trace(*problem)
  text = traced.lower(lowering_platforms=("tpu",)).as_text()
  assert text.count("tpu_custom_call") == 1


@pytest.mark.fast
def test_it_lowers_in_a_checked_shard_map():
  mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
  problem, head = _shapes(pages=jnp.int8), P(None, "d")
  split = jax.shard_map(
    functools.partial(tpu_paged_forward, scale=0.1),
    mesh=mesh,
    in_specs=(head, head, head, P()),
    out_specs=(head, head),
  )
  text = jax.jit(split).trace(*problem).lower(lowering_platforms=("tpu",))
  assert text.as_text().count("tpu_custom_call") == 1


@pytest.mark.fast
@pytest.mark.parametrize(
  "shapes, message",
  [
    ({"dtype": jnp.float16}, "the dtype is float16, not float32 or bfloat16"),
    ({"H": 96}, r"the head width H=96 is none of \(64, 128, 256\)"),
    ({"Z": 48}, r"the page size Z=48 is none of \(16, 32, 64, 128, 256\)"),
    ({"H": 64}, "pages of H=64 need Z a multiple of 128, got Z=64"),
    ({"M": 40_000}, "a row's table has M=40000 entries, more than the 32768"),
    ({"B": 10_000}, "20000 rows are more than the 16384"),
    ({"G": 80}, "G=80 query heads for a key head are more than the 64"),
  ],
)
def test_what_is_not_supported_is_named(shapes, message):
  problem = _shapes(**shapes)
  assert re.search(message, unsupported(*problem[:3]))
  attend = functools.partial(tpu_paged_forward, scale=0.1)
  message += '.*; implementation="xla" can'
  with pytest.raises(NotImplementedError, match=message):
    jax.eval_shape(attend, *problem)
