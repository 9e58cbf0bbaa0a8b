"""FLOPs by formula, against counting by hand and the compiler's account."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxchunk as jc
from jaxchunk.chunking import chunk_outer, cost, layer_outer
from jaxchunk.chunking.plan import chunk_plan
from jaxchunk.models.families import preset
from jaxchunk.models.moe import MoE

# Wide in what multiplies, so that what only adds is little.
CFG = jc.ModelConfig(
  vocab_size=640,
  d_model=192,
  num_layers=1,
  num_heads=2,
  num_kv_heads=1,
  head_dim=16,
  d_ff=384,
)
# q, o: 192 x 32 each; k, v: 192 x 16 each; gate, up, down: 192 x 384 each.
LAYER = 2 * (2 * 192 * 32 + 2 * 192 * 16 + 3 * 192 * 384)
HEAD = 2 * 640 * 192


def plan_cost(
  lengths, chunk_size, live_chunks=1, strategy="chunk_outer", **cfg
):
  return cost.plan_cost(
    dataclasses.replace(CFG, **cfg),
    chunk_plan(lengths, chunk_size),
    live_chunks=live_chunks,
    strategy=strategy,
  )


@pytest.mark.fast
@pytest.mark.parametrize("window", [None, 1, 3, 7, 50])
@pytest.mark.parametrize(("start", "stop"), [(0, 0), (0, 9), (2, 5), (5, 20)])
def test_visible_pairs_are_those_of_the_mask(start, stop, window):
  pairs = sum(
    1
    for query in range(start, stop)
    for key in range(query + 1)
    if window is None or query - key < window
  )
  assert cost.visible_pairs(start, stop, window) == pairs


@pytest.mark.fast
def test_flops_by_hand():
  assert cost.layer_flops_per_token(CFG) == LAYER
  assert cost.head_flops_per_token(CFG) == HEAD
  # Two products of 16 channels for each of two heads, 6 pairs among 3 tokens.
  assert cost.attention_flops(CFG, 0, 3) == 2 * 2 * 16 * 2 * 6
  needed = 3 * (7 * (LAYER + HEAD) + 128 * (6 + 10))
  assert cost.model_flops(CFG, [3, 4]) == needed


@pytest.mark.fast
def test_experts_count_those_that_a_token_goes_to():
  moe = MoE(num_experts=8, experts_per_token=2, d_ff=96, shared_d_ff=64)
  cfg = dataclasses.replace(CFG, moe=moe)
  other = 192 * (8 + 3 * (64 + 2 * 96)) - 3 * 192 * 384
  assert cost.layer_flops_per_token(cfg) == LAYER + 2 * other
  # The batch's balance is counted by one more forward pass of every chunk.
  balanced = dataclasses.replace(moe, balance_loss=0.1)
  less, more = (plan_cost([24, 3], 8, moe=m) for m in (moe, balanced))
  assert more.model == less.model
  forward = sum(c.forward for lane in less.chunks for c in lane)
  assert more.hardware == less.hardware + forward


@pytest.mark.fast
def test_active_parameters_are_those_published():
  cfg = preset("mixtral-8x7b")
  assert cost.active_parameters(cfg, 46_702_792_704) == 12_879_925_248
  assert cost.active_parameters(CFG, 100) == 100


@pytest.mark.fast
def test_sharing_keys_saves_projections_not_attention():
  many = dataclasses.replace(CFG, num_kv_heads=2)
  saved = cost.layer_flops_per_token(many) - LAYER
  assert saved == 2 * 2 * 192 * 16
  assert cost.attention_flops(many, 0, 9) == cost.attention_flops(CFG, 0, 9)


@pytest.mark.fast
def test_window_layers_count_their_own_pairs():
  cfg = dataclasses.replace(CFG, num_layers=3, window_pattern=(2, None))
  # Two layers see 1 + 2 + 2 + 2 keys, one sees 1 + 2 + 3 + 4.
  assert cost.attention_flops(cfg, 0, 4) == 128 * (2 * 7 + 10)


@pytest.mark.fast
def test_padding_and_recomputation_by_hand():
  # Two chunks of 8, the first one run forward twice, 3 positions of padding.
  got = plan_cost([13], 8)
  pairs = [8 * 9 // 2, 13 * 14 // 2 - 8 * 9 // 2]
  assert got.padding == 3 * (LAYER + 2 * LAYER + 3 * HEAD)
  assert got.recomputed == 8 * LAYER + 128 * pairs[0] + 64 * sum(pairs)
  assert got.model == cost.model_flops(CFG, [13])
  assert got.lanes == [got.hardware]
  # All live: nothing runs forward twice, but scores are computed again.
  assert plan_cost([13], 8, 2).recomputed == 64 * sum(pairs)
  # None live: padding runs forward twice as well.
  assert plan_cost([13], 8, 0).padding == 3 * (4 * LAYER + 3 * HEAD)


@pytest.mark.fast
def test_layer_outer_runs_all_forward_twice_and_keys_once_more():
  got = plan_cost([16], 8, strategy="layer_outer")
  pairs = 16 * 17 // 2
  keys = 2 * 2 * 192 * 16
  down = 2 * 192 * 384
  assert got.recomputed == 16 * (LAYER + keys - down) + (128 + 64) * pairs
  normed = plan_cost([16], 8, strategy="layer_outer", post_norms=True)
  assert normed.recomputed == got.recomputed + 16 * down
  # A lane of one chunk runs as chunk-outer does.
  one = plan_cost([8], 8, strategy="layer_outer")
  assert one == plan_cost([8], 8)


@pytest.mark.fast
def test_packed_sequences_do_not_see_each_other():
  packed = plan_cost([4, 4], 8)
  assert packed.hardware < plan_cost([8], 8).hardware
  assert packed.padding == 0
  assert packed.chunk_imbalance == packed.lane_imbalance == 1


@pytest.mark.fast
def test_imbalance_is_the_costliest_over_the_mean():
  # Attention dominates: the later chunks of the long one cost the most.
  got = plan_cost(
    [64, 8], 8, num_heads=64, num_kv_heads=1, d_ff=1, vocab_size=1
  )
  costs = [c.total for lane in got.chunks for c in lane]
  assert len(costs) == 9
  assert got.chunk_imbalance == pytest.approx(9 * max(costs) / sum(costs))
  assert costs.index(max(costs)) == 7
  assert got.lane_imbalance == pytest.approx(2 * got.lanes[0] / got.hardware)
  assert plan_cost([], 8).chunk_imbalance == 1


@pytest.mark.fast
@pytest.mark.parametrize("live", [0, 1, 2, 5])
@pytest.mark.parametrize("strategy", ["chunk_outer", "layer_outer"])
def test_passes_are_those_of_the_schedule(live, strategy):
  layers = 3
  if strategy == "layer_outer":
    ops = layer_outer.schedule(4, layers)
  else:
    ops, layers = chunk_outer.schedule(4, live), 1
  counted = [
    sum(chunk == i and op != "B" for op, chunk in ops) / layers
    for i in range(4)
  ]
  assert cost.forward_passes(4, live, strategy) == counted
  assert sorted(i for op, i in ops if op == "B") == sorted([*range(4)] * layers)


def compiled_flops(program, *args):
  return jax.jit(program).lower(*args).compile().cost_analysis()["flops"]


def abstract(cfg):
  return nnx.eval_shape(lambda: jc.Transformer(cfg, rngs=nnx.Rngs(0)))


def test_the_compiler_counts_the_same_forward():
  size = 128
  tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)

  def forward(model, tokens):
    return model(tokens, implementation="reference")

  # The naive attention computes hidden pairs too.
  formula = size * (LAYER + HEAD) + 4 * 2 * 16 * size**2
  assert compiled_flops(forward, abstract(CFG), tokens) == pytest.approx(
    formula, rel=0.03
  )


def test_the_compiler_counts_the_same_for_experts():
  # As many slots as copies: no product is in vain.
  moe = MoE(num_experts=4, experts_per_token=2, d_ff=256, capacity_factor=1.0)
  cfg = dataclasses.replace(CFG, moe=moe)
  size = 128
  tokens = jax.ShapeDtypeStruct((1, size), jnp.int32)

  def forward(model, tokens):
    return model(tokens, implementation="reference")

  layer = cost.layer_flops_per_token(cfg)
  formula = size * (layer + HEAD) + 4 * 2 * 16 * size**2
  assert compiled_flops(forward, abstract(cfg), tokens) == pytest.approx(
    formula, rel=0.03
  )


@pytest.mark.parametrize(
  ("live", "strategy", "chunks"),
  [
    # The compiler counts the body of a loop once: of layers one, and of
    # chunks one, which with one live chunk is the whole work of two.
    (1, "chunk_outer", 2),
    (1, "layer_outer", 1),
  ],
)
def test_the_compiler_counts_the_same_gradient(live, strategy, chunks):
  # So wide that attention, whose loops have two bodies, is little. A single
  # layer would be no loop, and nobody reads the last one's output in a drop.
  cfg = dataclasses.replace(CFG, num_heads=1, d_ff=1024)
  two = dataclasses.replace(cfg, num_layers=2)
  size = 64
  lowered = jc.lower_chunked(
    abstract(two),
    capacity=2 * size,
    chunk_size=size,
    live_chunks=live,
    strategy=strategy,
  )
  counted = lowered.compile().cost_analysis()["flops"]
  whole = cost.plan_cost(
    cfg, chunk_plan([2 * size], size), live_chunks=live, strategy=strategy
  )
  formula = whole.hardware * chunks / 2
  assert counted == pytest.approx(formula, rel=0.03)


def test_attention_backward_is_five_products_for_two():
  shape = jax.ShapeDtypeStruct((1, 256, 2, 256), jnp.float32)

  def forward(q, k, v):
    return jc.attention(q, k, v, mask=jc.AttentionMask.causal()).sum()

  once = compiled_flops(forward, shape, shape, shape)
  both = compiled_flops(jax.grad(forward, (0, 1, 2)), shape, shape, shape)
  assert both / once == pytest.approx(1 + 5 / 2, rel=0.1)
