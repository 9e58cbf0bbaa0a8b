"""Which parameters get gradients, and the accumulators of their gradients."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Array, Float, Int

from jaxchunk.models.transformer import Transformer

Leaf = TypeVar("Leaf")


def widened(a: Array) -> Array:
  """In at least fp32, so that its gradient is too."""
  return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def check_trainable(model: Transformer, trainable: Any) -> None:
  """Refuses to train all of a model that is quantized.

  Raises:
    ValueError: `trainable` is `None`, and there are quantized matrices.
  """
  if trainable is None and model.cfg.quantization is not None:
    raise ValueError(
      "trainable=None means all parameters, and the model's matrices are "
      "quantized, which cannot be trained; add_lora and train the adapters, "
      "trainable=nnx.LoRAParam"
    )


class Subset(NamedTuple):
  """The trainable leaves of a pytree, by place in its flat order."""

  chosen: tuple[bool, ...]

  def split(
    self, tree: Any
  ) -> tuple[list[Array], Callable[[list[Array]], Any]]:
    """The chosen leaves, and a function that puts others in their place."""
    leaves, treedef = jax.tree.flatten(tree)

    def rebuild(chosen: list[Array]) -> Any:
      new = iter(chosen)
      merged = [
        next(new) if mine else leaf
        for mine, leaf in zip(self.chosen, leaves, strict=True)
      ]
      return jax.tree.unflatten(treedef, merged)

    picked = zip(self.chosen, leaves, strict=True)
    return [leaf for mine, leaf in picked if mine], rebuild


@dataclasses.dataclass(frozen=True)
class Trainable:
  """The trainable leaves of a model; gradients are lists in their order.

  Attributes:
    paths: Path of every leaf of the model.
    chosen: Whether it is trainable.
  """

  paths: tuple[tuple[Any, ...], ...]
  chosen: tuple[bool, ...]

  @classmethod
  def of(cls, model: Transformer, trainable: Any = None) -> "Trainable":
    """Resolves a choice of parameters.

    Args:
      model: The model, or its abstract copy.
      trainable: `None` for every parameter, an `nnx` filter (a variable type,
        a predicate of path and value, `nnx.PathContains(...)`, ...), or an
        `nnx.State` with the wanted parameters.

    Returns:
      The selection.

    Raises:
      ValueError: Nothing is chosen, or a path is not in the model.
    """
    paths = tuple(nnx.to_flat_state(nnx.state(model)).paths)
    if isinstance(trainable, nnx.State):
      wanted = set(nnx.to_flat_state(trainable).paths)
      if unknown := wanted - set(paths):
        raise ValueError(
          f"trainable names parameters that the model lacks: "
          f"{sorted('/'.join(map(str, p)) for p in unknown)}"
        )
    else:
      kind = nnx.Param if trainable is None else trainable
      wanted = set(nnx.to_flat_state(nnx.state(model, kind)).paths)
    if not wanted:
      raise ValueError(
        f"trainable={trainable!r} chooses no parameter of the model"
      )
    return cls(paths, tuple(path in wanted for path in paths))

  def state(self, grads: list[Array]) -> nnx.State:
    """Gradients as an `nnx.State` of parameters."""
    flat = [
      (path, nnx.Param(grad))
      for path, grad in zip(self._wanted(), grads, strict=True)
    ]
    return nnx.from_flat_state(nnx.FlatState(flat, sort=False))

  def zeros(self, model: Transformer) -> list[Array]:
    """Zero accumulators in at least fp32."""
    leaves = jax.tree.leaves(model)
    return [
      jnp.zeros(leaf.shape, jnp.promote_types(leaf.dtype, jnp.float32))
      for leaf, mine in zip(leaves, self.chosen, strict=True)
      if mine
    ]

  def block(self, position: int) -> Subset:
    """Of the layers at one position of the window pattern."""
    return self._under("blocks", position)

  def matrices(self, position: int) -> Subset:
    """Of those layers what is multiplied by tokens: kernels and adapters."""
    return self._of_block(position, matrices=True)

  def vectors(self, position: int) -> Subset:
    """Of those layers all else: norms, biases, magnitudes."""
    return self._of_block(position, matrices=False)

  def products(self, position: int) -> frozenset[str]:
    """Names on the `Tape` of what those matrices are multiplied by."""
    found = set()
    for path, mine in zip(self.paths, self.chosen, strict=True):
      if mine and path[:2] == ("blocks", position) and _is_matrix(path):
        _, _, name, *inner = path
        if name == "experts":
          name = "router" if inner[-1] == "router" else f"expert_{inner[-1]}"
        found.add(name)
    return frozenset(found)

  def _of_block(self, position: int, *, matrices: bool) -> Subset:
    under = ("blocks", position)
    pairs = zip(self.paths, self.chosen, strict=True)
    return Subset(
      tuple(
        mine and _is_matrix(path) == matrices
        for path, mine in pairs
        if path[:2] == under
      )
    )

  def final_norm(self) -> Subset:
    """Of the final norm."""
    return self._under("final_norm")

  def add_layer(
    self,
    grads: list[Array],
    position: int,
    index: Any,
    gradients: Sequence[Array | None],
  ) -> list[Array]:
    """Adds the gradients of one layer, in place; `None` is nothing to add."""
    places = self._places("blocks", position)
    grads = list(grads)
    for place, gradient in zip(places, gradients, strict=True):
      if gradient is None:
        continue
      old = lax.dynamic_index_in_dim(grads[place], index, keepdims=False)
      new = old + gradient.astype(old.dtype)
      grads[place] = lax.dynamic_update_index_in_dim(
        grads[place], new, index, 0
      )
    return grads

  def add_final_norm(
    self, grads: list[Array], gradients: list[Array]
  ) -> list[Array]:
    """Adds the gradients of the final norm."""
    grads = list(grads)
    for place, gradient in zip(
      self._places("final_norm"), gradients, strict=True
    ):
      grads[place] = grads[place] + gradient.astype(grads[place].dtype)
    return grads

  def where_final_norm(
    self, flag: Array, new: list[Array], old: list[Array]
  ) -> list[Array]:
    """The new accumulators, of the final norm only where the flag is set."""
    new = list(new)
    for place in self._places("final_norm"):
      new[place] = jnp.where(flag, new[place], old[place])
    return new

  def add_embedding(
    self,
    grads: list[Array],
    model: Transformer,
    tokens: Int[Array, "*B C"],
    dx: Float[Array, "*B C D"],
  ) -> list[Array]:
    """Adds the gradient of `Transformer.embed_tokens`, row by row."""
    for place in self._places("embed"):
      grads = list(grads)
      if model.cfg.scale_embeddings:
        dx = dx * jnp.asarray(model.cfg.d_model**0.5, dx.dtype)
      grads[place] = grads[place].at[tokens].add(dx.astype(grads[place].dtype))
    return grads

  def unembed_accumulator(
    self, grads: list[Array]
  ) -> Float[Array, "V D"] | None:
    """The head's accumulator; `None` if the head is frozen."""
    place = self._unembed_place()
    return None if place is None else grads[place]

  def set_unembed(
    self, grads: list[Array], accumulator: Float[Array, "V D"] | None
  ) -> list[Array]:
    """Puts the head's accumulator back."""
    place = self._unembed_place()
    if place is None or accumulator is None:
      return grads
    return [accumulator if n == place else g for n, g in enumerate(grads)]

  @property
  def embed_leaf(self) -> int:
    """Where the embedding is among the leaves of the model."""
    return self.paths.index(("embed",))

  @property
  def unembed_leaf(self) -> int:
    """Where the head's matrix is: the embedding's, when tied."""
    paths = self.paths
    return paths.index(("head",)) if ("head",) in paths else self.embed_leaf

  def under(self, leaves: Sequence[Leaf], *prefix: Any) -> list[Leaf]:
    """Of what there is one for each leaf, that of the trainable ones here."""
    size = len(prefix)
    triples = zip(self.paths, self.chosen, leaves, strict=True)
    return [x for p, mine, x in triples if mine and p[:size] == prefix]

  def _unembed_place(self) -> int | None:
    places = self._places(*self.paths[self.unembed_leaf])
    return places[0] if places else None

  def _wanted(self) -> list[tuple[Any, ...]]:
    return [p for p, mine in zip(self.paths, self.chosen, strict=True) if mine]

  def _places(self, *prefix: Any) -> list[int]:
    """Where the gradients under a path lie in the list."""
    size = len(prefix)
    wanted = enumerate(self._wanted())
    return [n for n, path in wanted if path[:size] == prefix]

  def _under(self, *prefix: Any) -> Subset:
    size = len(prefix)
    pairs = zip(self.paths, self.chosen, strict=True)
    return Subset(tuple(mine for path, mine in pairs if path[:size] == prefix))


def _is_matrix(path: tuple[Any, ...]) -> bool:
  """Whether a parameter of a layer is one that a `Tape` multiplies by."""
  return path[-1] in ("kernel", "a", "b") or "experts" in path
