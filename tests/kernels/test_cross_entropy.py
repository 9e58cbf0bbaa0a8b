"""Every implementation against fp64 truth, and what only the tiled one does.

The TPU kernels are interpreted; what is theirs alone is in
test_cross_entropy_tpu.py. The interpreter of the GPU kernel takes seconds a
run: all but one of its tests are in test_cross_entropy_gpu.py.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads

from jaxchunk.kernels.cross_entropy import (
  pallas_gpu,
  pallas_tpu,
  reference,
  xla,
)
from jaxchunk.kernels.cross_entropy.api import (
  linear_cross_entropy,
  linear_cross_entropy_with_grad,
)
from jaxchunk.kernels.cross_entropy.tpu.bodies import Tile

try:
  from jax.experimental.pallas.mosaic_gpu import InterpretGPUParams
except ImportError:  # private before jax 0.11
  from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

IMPLEMENTATIONS = ["xla", "reference"]
WITH_KERNELS = [*IMPLEMENTATIONS, "pallas_tpu"]
# Several tiles both ways, the last of each moved back over the one before.
SMALL = xla.BlockSizes(rows=8, vocab=16)
SMALL_KEPT = xla.BlockSizes(rows=8, vocab=16, keep=True)

TPU = {
  "blocks": pallas_tpu.TpuBlocks(Tile(16, 8), Tile(8, 16), Tile(24, 8)),
  "interpret": True,
}
GPU = {
  "blocks": pallas_gpu.GpuBlocks(rows=128, vocab=64, tile=64),
  "interpret": InterpretGPUParams(),
}


def plain(name):
  """`linear_cross_entropy` of an implementation."""
  if name in IMPLEMENTATIONS:
    return functools.partial(linear_cross_entropy, implementation=name)
  module, options = of_kernels(name)
  return functools.partial(module.linear_cross_entropy, **options)


def fused(name):
  """`linear_cross_entropy_with_grad` of an implementation."""
  if name in IMPLEMENTATIONS:
    call = linear_cross_entropy_with_grad
    return functools.partial(call, implementation=name)
  module, options = of_kernels(name)
  return functools.partial(module.linear_cross_entropy_with_grad, **options)


def of_kernels(name):
  return (pallas_gpu, GPU) if name == "pallas_gpu" else (pallas_tpu, TPU)


def make(shape, vocab, width=12, dtype=np.float64, seed=0):
  rng = np.random.default_rng(seed)
  x = rng.normal(size=(*shape, width))
  w = rng.normal(size=(vocab, width)) * 0.5
  labels = rng.integers(0, vocab, shape).astype(np.int32)
  return jnp.asarray(x, dtype), jnp.asarray(w, dtype), jnp.asarray(labels)


def make_cotangents(shape, dtype=np.float64, seed=1):
  rng = np.random.default_rng(seed)
  g_nll, g_lse = rng.normal(size=(2, *shape))
  return jnp.asarray(g_nll, dtype), jnp.asarray(g_lse, dtype)


def value_and_grad(function, x, w, labels, cotangents):
  def step(x, w, labels, cotangents):
    out, vjp = jax.vjp(lambda x, w: function(x, w, labels), x, w)
    return (*out, *vjp(cotangents))

  return jax.jit(step)(x, w, labels, cotangents)


def naive(x, w, labels, softcap=None):
  logits = x @ w.T
  if softcap is not None:
    logits = softcap * jnp.tanh(logits / softcap)
  hit = jax.nn.one_hot(labels, w.shape[0], dtype=x.dtype)
  log_p = jax.nn.log_softmax(logits)
  return -(hit * log_p).sum(-1), jax.nn.logsumexp(logits, -1)


def assert_close(got, want, rtol, names=("nll", "lse", "dx", "dw")):
  for name, a, b in zip(names, got, want, strict=True):
    scale = float(jnp.abs(b).max())
    np.testing.assert_allclose(a, b, rtol=0, atol=rtol * scale, err_msg=name)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("shape", "vocab", "softcap"), [((1,), 5, None), ((2, 3, 5), 101, 3.0)]
)
def test_equals_the_naive_formula_in_fp64(
  implementation, shape, vocab, softcap
):
  with jax.enable_x64(True):
    x, w, labels = make(shape, vocab)
    cotangents = make_cotangents(shape)
    got = value_and_grad(
      functools.partial(
        linear_cross_entropy, softcap=softcap, implementation=implementation
      ),
      x,
      w,
      labels,
      cotangents,
    )
    want = value_and_grad(
      functools.partial(naive, softcap=softcap), x, w, labels, cotangents
    )
    assert all(a.dtype == jnp.float64 for a in got)
    assert_close(got, want, 1e-13)


@pytest.mark.fast
@pytest.mark.parametrize(
  ("rows", "vocab", "softcap"),
  [(1, 61, None), (24, 48, 3.0), (37, 61, None), (9, 17, 3.0)],
)
def test_tiles_change_nothing(rows, vocab, softcap):
  with jax.enable_x64(True):
    x, w, labels = make((rows,), vocab)
    cotangents = make_cotangents((rows,))
    blocks = xla.BlockSizes(min(8, rows), 16)
    function = functools.partial(
      xla.linear_cross_entropy, softcap=softcap, blocks=blocks
    )
    got = value_and_grad(function, x, w, labels, cotangents)
    want = value_and_grad(
      functools.partial(naive, softcap=softcap), x, w, labels, cotangents
    )
    assert_close(got, want, 1e-13)


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_match_finite_differences(softcap):
  with jax.enable_x64(True):
    x, w, labels = make((11,), 19, width=4)
    function = functools.partial(
      xla.linear_cross_entropy, labels=labels, softcap=softcap, blocks=SMALL
    )
    check_grads(function, (x, w), order=1, modes=["rev"])


@pytest.mark.fast
@pytest.mark.parametrize(
  ("blocks", "softcap"),
  [(SMALL, None), (SMALL_KEPT, None), (SMALL_KEPT, 3.0), (None, 3.0)],
)
def test_with_grad_equals_the_gradient(blocks, softcap):
  with jax.enable_x64(True):
    x, w, labels = make((3, 13), 61)
    weights, _ = make_cotangents((3, 13))
    init = jnp.asarray(np.random.default_rng(2).normal(size=w.shape))
    got = xla.linear_cross_entropy_with_grad(
      x, w, labels, weights, softcap=softcap, dw_init=init, blocks=blocks
    )
    nll, lse, dx, dw = value_and_grad(
      functools.partial(naive, softcap=softcap),
      x,
      w,
      labels,
      (weights, jnp.zeros_like(weights)),
    )
    assert_close(got, (nll, lse, dx, init + dw), 1e-13)


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_with_grad_of_a_frozen_head(implementation):
  x, w, labels = make((2, 9), 101, dtype=np.float32)
  weights, _ = make_cotangents((2, 9), np.float32)
  call = fused(implementation)
  want = call(x, w, labels, weights, dw_init=jnp.zeros(w.shape))
  *got, dw = call(x, w, labels, weights, dw_init=None)
  assert dw is None
  assert_close(got, want[:3], 1e-6, ("nll", "lse", "dx"))


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_with_grad_is_the_gradient_added_to_what_there_was(implementation):
  x, w, labels = make((2, 65), 101, dtype=np.float32)
  weights, _ = make_cotangents((2, 65), np.float32)
  init = np.random.default_rng(2).integers(-9, 9, w.shape)
  init = jnp.asarray(init, jnp.float32)
  *got, dw = fused(implementation)(x, w, labels, weights, dw_init=init)
  want = value_and_grad(
    plain(implementation), x, w, labels, (weights, jnp.zeros_like(weights))
  )
  assert dw.dtype == jnp.float32
  assert_close(got, want[:3], 1e-6, ("nll", "lse", "dx"))
  # The sum is rounded at the size of `init`.
  np.testing.assert_allclose(dw - init, want[3], rtol=0, atol=1e-5)


@pytest.mark.parametrize("garbage", [1e30, np.inf, np.nan])
@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_rows_of_weight_zero_add_nothing(implementation, garbage):
  x, w, labels = make((61,), 101, dtype=np.float32)
  # Of the TPU's blocks some are full, some mixed, some without any weight.
  weights = (np.arange(61) % 3 != 0) | (np.arange(61) < 24)
  weights[36:56] = False
  weights = jnp.asarray(weights, jnp.float32)
  call = jax.jit(fused(implementation))
  init = jnp.zeros(w.shape)
  *_, dx, dw = call(x, w, labels, weights, dw_init=init)
  dirty = jnp.where(weights[:, None] == 0, garbage, x)
  odd_labels = jnp.where(weights == 0, -100, labels)
  *_, dirty_dx, dirty_dw = call(dirty, w, odd_labels, weights, dw_init=init)
  assert not np.asarray(dx)[np.asarray(weights) == 0].any()
  np.testing.assert_array_equal(dx, dirty_dx)
  np.testing.assert_array_equal(dw, dirty_dw)


def truth(x, w, labels, cotangents, softcap):
  """nll, lse, dx and dw in fp64."""
  with jax.enable_x64(True):
    wide = [jnp.asarray(np.asarray(a, np.float64)) for a in (x, w, *cotangents)]
    function = functools.partial(naive, softcap=softcap)
    want = value_and_grad(function, *wide[:2], labels, tuple(wide[2:]))
    return [np.asarray(a) for a in want]


def assert_errs_at_most_twice_as_much(got, peer, want):
  names = ("nll", "lse", "dx", "dw")
  for name, ours, theirs, true in zip(names, got, peer, want, strict=True):
    errors = [
      np.abs(np.asarray(a, np.float64) - true).max() for a in (ours, theirs)
    ]
    assert errors[0] <= 2 * errors[1], (name, errors)


@pytest.mark.parametrize(
  ("dtype", "softcap", "one_pass"),
  [
    (jnp.bfloat16, None, False),
    (jnp.bfloat16, 3.0, True),
    (jnp.float32, 3.0, False),
    (jnp.float32, None, True),
  ],
)
def test_errs_at_most_twice_the_plain_computation(dtype, softcap, one_pass):
  # Such that XLA picks the same matrix product for a tile as for the whole:
  # that of small matrices errs 2.5 times as much, and with AVX2 so does one of
  # odd sizes. The last tile overlaps the one before in both axes.
  shape, vocab = (320,), 1344
  x, w, labels = make(shape, vocab, width=64, dtype=dtype)
  g_nll, g_lse = make_cotangents(shape, np.float32)
  if one_pass:
    g_lse = jnp.zeros_like(g_lse)
    got = xla.linear_cross_entropy_with_grad(
      x,
      w,
      labels,
      g_nll,
      softcap=softcap,
      dw_init=jnp.zeros(w.shape),
      blocks=xla.BlockSizes(128, 512, keep=True),
    )
  else:
    tiled = functools.partial(
      xla.linear_cross_entropy,
      softcap=softcap,
      blocks=xla.BlockSizes(128, 512),
    )
    got = value_and_grad(tiled, x, w, labels, (g_nll, g_lse))
  function = functools.partial(naive, softcap=softcap)
  peer = value_and_grad(
    function, x, w, labels, (g_nll.astype(dtype), g_lse.astype(dtype))
  )
  want = truth(x, w, labels, (g_nll, g_lse), softcap)
  assert_errs_at_most_twice_as_much(got, peer, want)


@pytest.mark.fast
def test_dtypes():
  x, w, labels = make((2, 5), 17, dtype=np.float32)
  bf16 = x.astype(jnp.bfloat16)
  nll, lse, dx, dw = value_and_grad(
    linear_cross_entropy, bf16, w, labels, make_cotangents((2, 5), np.float32)
  )
  assert (nll.dtype, lse.dtype) == (jnp.float32, jnp.float32)
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)
  dx, dw = linear_cross_entropy_with_grad(
    bf16, w.astype(jnp.bfloat16), labels, nll, dw_init=dw
  )[2:]
  assert (dx.dtype, dw.dtype) == (jnp.bfloat16, jnp.float32)


@pytest.mark.parametrize("implementation", [*WITH_KERNELS, "pallas_gpu"])
def test_no_rows(implementation):
  x, w, labels = make((3, 0), 64, width=64, dtype=jnp.bfloat16)
  got = value_and_grad(
    plain(implementation),
    x,
    w,
    labels,
    (jnp.zeros((3, 0)), jnp.zeros((3, 0))),
  )
  assert [a.shape for a in got] == [(3, 0), (3, 0), x.shape, w.shape]
  assert not got[3].any()
  weights, init = jnp.zeros((3, 0)), jnp.ones(w.shape)
  got = fused(implementation)(x, w, labels, weights, dw_init=init)
  assert [a.shape for a in got] == [(3, 0), (3, 0), x.shape, w.shape]
  np.testing.assert_array_equal(got[3], init)


def temp_bytes(function, *args, **jit_kwargs):
  compiled = jax.jit(function, **jit_kwargs).lower(*args).compile()
  return compiled.memory_analysis().temp_size_in_bytes


def test_memory_does_not_grow_as_rows_times_vocabulary():
  vocab, width = 8192, 32

  def measure(rows):
    x = jax.ShapeDtypeStruct((rows, width), jnp.float32)
    w = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
    labels = jax.ShapeDtypeStruct((rows,), jnp.int32)
    weights = jax.ShapeDtypeStruct((rows,), jnp.float32)

    def plain(x, w, labels):
      nll, lse = linear_cross_entropy(x, w, labels)
      return nll.sum() + jnp.square(lse).sum()

    def fused(x, w, labels, weights, dw):
      return linear_cross_entropy_with_grad(x, w, labels, weights, dw_init=dw)

    forward = temp_bytes(plain, x, w, labels)
    backward = temp_bytes(jax.grad(plain, (0, 1)), x, w, labels)
    one_pass = temp_bytes(
      fused, x, w, labels, weights, w, donate_argnums=4, keep_unused=True
    )
    return np.array([forward, backward, one_pass])

  small, large = measure(2048), measure(8192)
  assert (small < 2 * xla._TILE_BYTES).all(), small
  # A few numbers and rows of x a token, against 4 * vocab bytes of logits.
  assert (large - small < (8192 - 2048) * 4 * 4 * width).all(), (small, large)


def test_the_gradient_of_w_is_accumulated_in_place():
  vocab, width = 4096, 1024  # dw is as large as a tile may be
  x = jax.ShapeDtypeStruct((64, width), jnp.float32)
  w = jax.ShapeDtypeStruct((vocab, width), jnp.float32)
  labels = jax.ShapeDtypeStruct((64,), jnp.int32)
  weights = jax.ShapeDtypeStruct((64,), jnp.float32)
  blocks = xla.BlockSizes(rows=16, vocab=256, keep=True)

  def fused(x, w, labels, weights, dw):
    return xla.linear_cross_entropy_with_grad(
      x, w, labels, weights, dw_init=dw, blocks=blocks
    )

  used = temp_bytes(fused, x, w, labels, weights, w, donate_argnums=4)
  assert used < 4 * vocab * width / 4, used


@pytest.mark.fast
@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_bitwise_repeatable(implementation):
  x, w, labels = make((50,), 101, dtype=np.float32)
  cotangents = make_cotangents((50,), np.float32)
  function = plain(implementation)
  if implementation == "xla":
    function = functools.partial(xla.linear_cross_entropy, blocks=SMALL)
  first, second = (
    value_and_grad(function, x, w, labels, cotangents) for _ in range(2)
  )
  for a, b in zip(first, second, strict=True):
    np.testing.assert_array_equal(a, b)


def on_mesh(function, in_specs, out_specs):
  mesh = jax.make_mesh((4, 2), ("data", "seq"), axis_types=(AxisType.Auto,) * 2)
  return jax.jit(
    jax.shard_map(
      function,
      mesh=mesh,
      in_specs=in_specs,
      out_specs=out_specs,
      check_vma=True,
    )
  )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("x_spec", "label_spec"),
  [(P("data", "seq"), P("data", "seq")), (P("data"), P("data", "seq"))],
  ids=["x sharded", "x replicated over seq"],
)
def test_shard_map_with_a_replicated_head(x_spec, label_spec, implementation):
  with jax.enable_x64(True):
    x, w, labels = make((4, 26), 61)
    if x_spec != label_spec:  # the same hidden state meets several labels
      x = x[:, :13]
    function = functools.partial(
      linear_cross_entropy, implementation=implementation
    )

    def loss(x, w, labels):
      nll, lse = function(x, w, labels)
      return jnp.sum(nll * 0.5 + jnp.square(lse))

    def local(x, w, labels):
      def total(x, w):
        return jax.lax.psum(loss(x, w, labels), ("data", "seq"))

      return jax.value_and_grad(total, (0, 1))(x, w)

    sharded = on_mesh(local, (x_spec, P(), label_spec), (P(), (x_spec, P())))
    got, (dx, dw) = sharded(x, w, labels)
    whole_x = x if x.shape[1] == 26 else jnp.concatenate([x, x], 1)
    want, (want_dx, want_dw) = jax.value_and_grad(loss, (0, 1))(
      whole_x, w, labels
    )
    if x.shape[1] != 26:
      want_dx = want_dx[:, :13] + want_dx[:, 13:]
    assert_close((got, dx, dw), (want, want_dx, want_dw), 1e-12, "ldw")


def test_shard_map_with_grad_returns_each_devices_share():
  with jax.enable_x64(True):
    x, w, labels = make((4, 26), 61)
    weights, _ = make_cotangents((4, 26))

    def local(x, w, labels, weights):
      nll, lse, dx, dw = linear_cross_entropy_with_grad(
        x, w, labels, weights, dw_init=jnp.zeros_like(w)
      )
      return nll, lse, dx, jax.lax.psum(dw, ("data", "seq"))

    s = P("data", "seq")
    got = on_mesh(local, (s, P(), s, s), (s, s, s, P()))(x, w, labels, weights)
    want = linear_cross_entropy_with_grad(
      x, w, labels, weights, dw_init=jnp.zeros_like(w)
    )
    assert_close(got, want, 1e-12)


@pytest.mark.fast
def test_labels_of_a_narrow_type_that_cannot_hold_the_vocabulary():
  x, w, labels = make((9,), 256, dtype=np.float32)
  want = linear_cross_entropy(x, w, labels)
  got = jax.jit(linear_cross_entropy)(x, w, labels.astype(jnp.uint8))
  np.testing.assert_array_equal(got[0], want[0])
  narrow = labels.astype(jnp.uint8)
  dx = jax.grad(lambda x: linear_cross_entropy(x, w, narrow)[0].sum())(x)
  assert np.isfinite(dx).all()


@pytest.mark.parametrize("implementation", WITH_KERNELS)
def test_labels_out_of_range(implementation):
  x, w, labels = make((9,), 101, dtype=np.float32)
  wrong = labels.at[4].set(101).at[6].set(-1)
  function = plain(implementation)
  nll, lse = jax.jit(function)(x, w, wrong)
  assert np.flatnonzero(np.isnan(nll)).tolist() == [4, 6]
  assert np.isfinite(lse).all()
  dx, dw = jax.jit(
    jax.grad(lambda x, w, labels: function(x, w, labels)[0].sum(), (0, 1))
  )(x, w, wrong)
  assert np.isnan(dx[4]).all() and np.isnan(dw).any()
  # Where the values are known, by the public function.
  function = functools.partial(
    linear_cross_entropy, implementation=implementation
  )
  message = r"\[0, V=101\), got 101 at \(4,\) \(2 such\)"
  for known in (wrong, np.asarray(wrong)):
    with pytest.raises(ValueError, match=message):
      function(x, w, known)
    with pytest.raises(ValueError, match=message):
      jax.grad(lambda x, known=known: function(x, w, known)[0].sum())(x)


@pytest.mark.fast
@pytest.mark.parametrize(
  ("changes", "message"),
  [
    ({"x": np.zeros((3, 4), np.int32)}, "x must be floating .* int32"),
    ({"x": np.zeros(4, np.float32)}, r"x must be .*\(4,\)"),
    ({"x": np.zeros((3, 5), np.float32)}, "x has width D=5, w has D=4"),
    ({"w": np.zeros((4,), np.float32)}, r"w must be .*\(4,\)"),
    ({"w": np.zeros((0, 4), np.float32), "labels": np.zeros(0, int)}, "w must"),
    ({"labels": np.zeros(2, np.int32)}, r"labels have shape \(2,\)"),
    ({"labels": np.zeros(3, np.float32)}, "labels must be integers"),
    ({"softcap": 0.0}, "softcap must be positive and finite, got 0.0"),
    ({"implementation": "triton"}, r"'triton' .*pallas_gpu.*xla"),
  ],
)
def test_wrong_arguments_raise(changes, message):
  arguments = {
    "x": np.zeros((3, 4), np.float32),
    "w": np.zeros((7, 4), np.float32),
    "labels": np.zeros(3, np.int32),
    **changes,
  }
  with pytest.raises(ValueError, match=message):
    linear_cross_entropy(
      arguments.pop("x"),
      arguments.pop("w"),
      arguments.pop("labels"),
      **arguments,
    )


@pytest.mark.parametrize(
  ("weights", "dw_init", "message"),
  [
    (np.zeros(2, np.float32), None, r"weights must be .*\(2,\)"),
    (np.zeros(3, np.int32), None, "weights must be floating"),
    (np.zeros(3, np.float32), np.zeros((7, 5), np.float32), "dw_init must be"),
    (np.zeros(3, np.float32), jnp.zeros((7, 4), jnp.bfloat16), "bfloat16"),
  ],
)
def test_wrong_arguments_of_with_grad_raise(weights, dw_init, message):
  x, w = np.zeros((3, 4), np.float32), np.zeros((7, 4), np.float32)
  with pytest.raises(ValueError, match=message):
    linear_cross_entropy_with_grad(
      x, w, np.zeros(3, np.int32), weights, dw_init=dw_init
    )


@pytest.mark.parametrize("rows", [0, 1, 7, 1000, 1025, 5000])
@pytest.mark.parametrize("vocab", [2, 4096, 5003, 50257, 262144])
@pytest.mark.parametrize("width", [64, 4096])
def test_chosen_blocks_are_bounded(rows, vocab, width):
  blocks = xla.choose_blocks(rows, vocab)
  grad = xla.choose_grad_blocks(rows, vocab, width)
  slack = 1.2  # rounding up to a multiple
  for chosen in (blocks, grad):
    assert min(1, rows) <= chosen.rows <= rows
    assert 1 <= chosen.vocab <= vocab
    assert chosen.rows * chosen.vocab * 4 <= slack * xla._TILE_BYTES
  if grad.keep:
    limit = max(xla._TILE_BYTES, vocab * width * 4 // 8)
    assert grad.rows * vocab * 4 <= slack * limit


def test_reference_is_autodiff_of_the_formula():
  x, w, labels = make((6,), 11, dtype=np.float32)
  text = str(jax.make_jaxpr(reference.linear_cross_entropy)(x, w, labels))
  assert "custom_vjp" not in text and "while" not in text
