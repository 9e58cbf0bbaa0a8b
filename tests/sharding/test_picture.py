"""The picture of a layout shows each device once."""

import pytest

from jaxchunk.sharding.mesh import Layout
from jaxchunk.sharding.picture import draw_layout


@pytest.mark.parametrize(
  "layout",
  [
    Layout(data=2, fsdp=2, context=2, tensor=2, slices=2),
    Layout(context=4),
    Layout(fsdp=64, context=4),
  ],
  ids=str,
)
def test_every_device_is_drawn_once(layout, tmp_path):
  figure = draw_layout(layout, tmp_path / "layout.png")
  (axes,) = figure.axes
  corners = {patch.get_xy() for patch in axes.patches}
  assert len(axes.patches) == len(corners) == layout.num_devices
  assert (tmp_path / "layout.png").stat().st_size > 0
  labels = {text.get_text().partition("\n")[0] for text in axes.texts}
  legible = layout.num_devices <= 64
  wanted = {str(n) for n in range(layout.num_devices)} if legible else set()
  assert labels == wanted
  assert len(axes.lines) == layout.slices - 1
