"""Recording and replaying a layer's products gives its plain gradients."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxchunk.models.config import ModelConfig
from jaxchunk.models.rope import rope_tables
from jaxchunk.models.tape import Tape
from jaxchunk.models.transformer import Block

_T = 6
_CFG = ModelConfig(
  vocab_size=10,
  d_model=12,
  num_layers=1,
  num_heads=4,
  num_kv_heads=2,
  head_dim=4,
  d_ff=20,
  qkv_bias=True,
)


class PlainTape(Tape):
  """Products that autodiff sees through."""

  def product(self, name, spec, x, w, *, keep=True, like=None):
    return jnp.einsum(spec, x, w.astype(x.dtype))


def random(shape, dtype, seed=0):
  return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), dtype)


def make_block(**fields):
  cfg = dataclasses.replace(_CFG, **fields).frozen()
  abstract = nnx.eval_shape(lambda: Block(cfg, None, nnx.Rngs(0)))
  return jax.tree.map(lambda s: random(s.shape, s.dtype), abstract)


def pieces(block, dtype):
  """Per piece: the function of (block, inputs, tape), and its inputs."""
  cfg = block.cfg
  positions = jnp.arange(_T)[None]
  tables = {
    cfg.rope: rope_tables(positions, cfg.head_dim, cfg.rope, jnp.dtype(dtype))
  }

  def pre(block, inputs, tape):
    return block.pre(*inputs, tables, tape)

  def post(block, inputs, tape):
    return block.post(*inputs, tape)

  x = random((1, _T, cfg.d_model), dtype, 1)
  o = random((1, 2, 2, _T, cfg.head_dim), dtype, 2)
  return {"pre": (pre, (x,)), "post": (post, (x, o))}


def gradients(piece, block, inputs, cotangent, tape):
  """What the backward pass of the executor computes."""
  _, vjp = jax.vjp(lambda b, i: piece(b, i, tape()), block, inputs)
  return vjp(cotangent)


def count_products(function, *arguments):
  """Matrix products left when what nobody reads is gone."""
  text = jax.jit(function).lower(*arguments).as_text()
  return text.count("stablehlo.dot_general")


def assert_close(got, want, tolerance=1e-11):
  for (path, g), w in zip(
    jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
  ):
    np.testing.assert_allclose(
      g, w, rtol=0, atol=tolerance, err_msg=jax.tree_util.keystr(path)
    )


PRODUCTS = {"pre": ("q", "k", "v"), "post": ("o", "gate", "up", "down")}
# With norms on both sides everything is read again but v.
FULL = {"qk_norm": True, "post_norms": True}
READ = {"pre": ("q", "k"), "post": PRODUCTS["post"]}
SUBSETS = [
  (part, names)
  for part, read in READ.items()
  for size in range(len(read) + 1)
  for names in itertools.combinations(read, size)
]


@pytest.mark.parametrize("part, names", SUBSETS)
def test_replay_gives_plain_gradients_and_repeats_what_was_not_kept(
  x64, part, names
):
  block = make_block(**FULL, dtype="float64", param_dtype="float64")
  piece, inputs = pieces(block, "float64")[part]
  tape = Tape()
  out = piece(block, inputs, tape)
  assert set(tape.saved) == set(READ[part])
  saved = {name: tape.saved[name] for name in names}
  cotangent = jax.tree.map(lambda a: random(a.shape, a.dtype, 3), out)

  def replayed(block, inputs, saved, cotangent):
    return gradients(piece, block, inputs, cotangent, lambda: Tape(saved))

  arguments = (block, inputs, saved, cotangent)
  want = gradients(piece, block, inputs, cotangent, PlainTape)
  assert_close(replayed(*arguments), want)
  # Two products for each gradient, and those that must be done again.
  missing = len(READ[part]) - len(names)
  expected = 2 * len(PRODUCTS[part]) + missing
  assert count_products(replayed, *arguments) == expected


@pytest.mark.fast
@pytest.mark.parametrize(
  "fields, part, kept",
  [
    ({}, "pre", {"q"}),
    ({}, "post", {"o", "gate", "up"}),
    (FULL, "pre", {"q", "k"}),
    (FULL, "post", {"o", "gate", "up", "down"}),
  ],
)
def test_a_tape_keeps_what_the_backward_pass_reads(x64, fields, part, kept):
  block = make_block(**fields, dtype="float64", param_dtype="float64")
  piece, inputs = pieces(block, "float64")[part]
  tape = Tape()
  out = piece(block, inputs, tape)
  assert_close(out, piece(block, inputs, PlainTape()))
  assert set(tape.saved) == kept
  cotangent = jax.tree.map(jnp.ones_like, out)

  def replayed(block, inputs, saved, cotangent):
    return gradients(piece, block, inputs, cotangent, lambda: Tape(saved))

  arguments = (block, inputs, tape.saved, cotangent)
  want = gradients(piece, block, inputs, cotangent, PlainTape)
  assert_close(replayed(*arguments), want)
  assert count_products(replayed, *arguments) == 2 * len(PRODUCTS[part])


@pytest.mark.fast
def test_what_is_kept_is_given_back_as_it_was():
  x, w = random((1, 3, 4), "float32"), random((4, 5), "float32")
  kept = random((1, 3, 5), "float32", 1)
  tape = Tape({"up": kept})
  np.testing.assert_array_equal(tape.product("up", "BTD,DF->BTF", x, w), kept)
  assert tape.saved == {"up": kept}


@pytest.mark.fast
@pytest.mark.parametrize("saved", [True, False])
def test_gradients_of_weights_are_not_rounded_to_bf16(saved):
  x, w = random((1, 512, 4), "bfloat16"), random((4, 5), "float32", 1)
  dy = random((1, 512, 5), "bfloat16", 2)
  spec = "BTD,DF->BTF"
  kept = {"y": Tape().product("y", spec, x, w)} if saved else {}
  y, vjp = jax.vjp(lambda x, w: Tape(kept).product("y", spec, x, w), x, w)
  dx, dw = vjp(dy)
  assert (y.dtype, dx.dtype, dw.dtype) == ("bfloat16", "bfloat16", "float32")
  want = np.einsum("td,tf->df", *(np.asarray(a[0], "float64") for a in (x, dy)))
  # Products of bf16 are exact in fp32: only the sum of 512 is rounded.
  np.testing.assert_allclose(dw, want, rtol=0, atol=512 * 2**-24 * 20)
  assert not np.array_equal(dw, dw.astype("bfloat16").astype("float32"))
