"""Synthetic crowds: a pinhole camera over a ground plane, drawn with exact head positions and exact depth.

The way of one picture: `spec` (what is asked) -> `layout` (the place a camera looks at) -> `background`
(its static layers, ray cast once) -> `crowd` (who stands where in this image) -> `render` (figures,
shadows, light, sensor).
"""

from crowdray.scenes.render import render
from crowdray.scenes.spec import RenderedScene, SceneSpec

__all__ = ["RenderedScene", "SceneSpec", "render"]
