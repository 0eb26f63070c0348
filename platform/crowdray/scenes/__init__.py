"""Synthetic crowds: images of a pinhole camera over a ground plane with exact head positions and depth.

Pipeline: `spec` (parameters) -> `layout` (static scene of a camera) -> `background` (its layers, ray cast once) ->
`crowd` (positions of people in one image) -> `render` (figures, shadows, lighting, sensor).
"""

from crowdray.scenes.render import render
from crowdray.scenes.spec import RenderedScene, SceneSpec

__all__ = ["RenderedScene", "SceneSpec", "render"]
