"""Synthetic scenes: determinism, perspective, occlusion, and ground truth that matches the image."""

import dataclasses
import hashlib
import multiprocessing

import numpy as np
import pytest

from crowdray.errors import UserError
from crowdray.scenes import RenderedScene, SceneSpec, render
from crowdray.scenes.background import render_background
from crowdray.scenes.camera import Camera
from crowdray.scenes.crowd import MIN_DISTANCE, sample_crowd
from crowdray.scenes.layout import scene_layout
from crowdray.scenes.people import HEAD_PARTS, person_sprites
from crowdray.scenes.raster import FINE, Figure, Raster
from crowdray.scenes.render import annotated_heads
from crowdray.scenes.spec import MAX_DEPTH, generator
from crowdray.scenes.sprites import PARTS, Sprite

SPEC = SceneSpec(seed=3, width=160, height=120, cameras=4)
CAMERA = Camera(width=320, height=240, focal=300, altitude=6, pitch=0.35)


def digest(scene: RenderedScene) -> str:
    parts = (scene.image, scene.points, scene.depth, scene.roi)
    return hashlib.sha256(b"".join(part.tobytes() for part in parts) + scene.scene.encode()).hexdigest()


def crowd_of(spec: SceneSpec, index: int) -> tuple[Figure, ...]:
    return sample_crowd(spec, scene_layout(spec, index % spec.cameras), generator(spec.seed, 3, index))


def people_in(spec: SceneSpec, index: int) -> int:
    return sum(figure.kind == "person" for figure in crowd_of(spec, index))


def person(sprite: Sprite, x: float, y: float) -> Figure:
    return Figure("person", sprite, np.ones((PARTS, 3), np.float32), x, y, 1.0)


def test_render_depends_on_spec_and_index_only() -> None:
    in_order = {index: digest(render(SPEC, index)) for index in (0, 5, 6)}
    scene_layout.cache_clear()
    render_background.cache_clear()
    assert in_order == {index: digest(render(SPEC, index)) for index in (6, 5, 0)}
    assert len(set(in_order.values())) == 3
    assert digest(render(dataclasses.replace(SPEC, seed=4), 0)) != in_order[0]

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert digest(pool.apply(render, (SPEC, 5))) == in_order[5]


def test_render_returns_documented_shapes_and_dtypes() -> None:
    for index in range(6):
        scene = render(SPEC, index)
        assert scene.image.shape == (120, 160, 3) and scene.image.dtype == np.uint8
        assert scene.points.ndim == 2 and scene.points.shape[1] == 2 and scene.points.dtype == np.float32
        assert scene.depth.shape == (120, 160) and scene.depth.dtype == np.float32
        assert scene.depth.min() > 0.5 and scene.depth.max() <= MAX_DEPTH
        assert scene.roi.shape == (120, 160) and scene.roi.dtype == np.bool_ and scene.roi.mean() > 0.05
        assert scene.scene == f"camera-{index % 4:02d}"


def test_project_equals_rotation_matrix() -> None:
    sin, cos = np.sin(CAMERA.pitch), np.cos(CAMERA.pitch)
    axes = np.array([[1, 0, 0], [0, -sin, -cos], [0, cos, -sin]])  # right, down, forward of the camera
    world = np.random.default_rng(0).uniform([-10, 5, 0], [10, 40, 2], (50, 3))
    right, down, z = axes @ (world - [0, 0, CAMERA.altitude]).T
    expected = np.stack([160 + 300 * right / z, 120 + 300 * down / z, z], 1)
    np.testing.assert_allclose(CAMERA.project(world), expected, rtol=1e-9)


def test_ground_inverts_project() -> None:
    columns, rows = np.array([10.5, 160.0, 300.5]), np.array([100.5, 239.5])
    for plane in (0.0, 1.7):
        x, y = CAMERA.ground(columns, rows, plane)
        back = CAMERA.project(np.stack([x, y, np.full_like(x, plane)], -1))
        np.testing.assert_allclose(back[..., 0], np.broadcast_to(columns, (2, 3)), atol=1e-3)
        np.testing.assert_allclose(back[..., 1], np.broadcast_to(rows[:, None], (2, 3)), atol=1e-3)


@pytest.mark.parametrize("distance", [7.0, 12.0, 20.0, 33.0])
def test_figure_size_follows_pinhole_model(distance: float) -> None:
    sprite = next(s for s in person_sprites() if s.size[2] < 1.85 and s.head is not None)
    assert sprite.head is not None
    raster = Raster(CAMERA)
    raster.draw(person(sprite, 1.0, distance), 0)
    rows = np.flatnonzero((raster.code > 0).any(1))
    top = CAMERA.project([1.0, distance, sprite.size[2]])
    foot = CAMERA.project([1.0, distance, 0.0])
    assert (rows[-1] - rows[0] + 1) / FINE == pytest.approx(foot[1] - top[1], abs=1.5)
    # An upright line of height h at forward distance Y spans f * h / z pixels, foreshortened by Y / z.
    middle = CAMERA.project([1.0, distance, sprite.size[2] / 2])
    expected = CAMERA.focal * sprite.size[2] / middle[2] * distance / middle[2]
    assert (rows[-1] - rows[0] + 1) / FINE == pytest.approx(expected, rel=0.03, abs=1.0)
    x, y, z = CAMERA.project([1.0 + sprite.head[0], distance, sprite.head[1]])
    head = np.argwhere(np.isin((raster.code >> 8) & 15, HEAD_PARTS)) / FINE
    np.testing.assert_allclose(head.mean(0)[::-1], [x, y], atol=0.03 * CAMERA.focal / z + 0.5)
    assert np.ptp(head[:, 1]) == pytest.approx(CAMERA.focal * 0.19 / z, rel=0.35, abs=1.0)


def test_raster_nearer_figure_occludes_in_any_order() -> None:
    near, far = person(person_sprites()[0], 0.0, 10.0), person(person_sprites()[7], 0.05, 10.6)
    forwards, backwards, alone = Raster(CAMERA), Raster(CAMERA), Raster(CAMERA)
    forwards.draw(far, 1)
    forwards.draw(near, 0)
    backwards.draw(near, 0)
    backwards.draw(far, 1)
    alone.draw(near, 0)
    np.testing.assert_array_equal(forwards.code, backwards.code)
    np.testing.assert_array_equal(forwards.forward, backwards.forward)
    np.testing.assert_array_equal(forwards.code[alone.code > 0], alone.code[alone.code > 0])
    assert (forwards.code >> 12 == 2).any()


@pytest.mark.parametrize("number", range(4))
def test_background_ground_depth_equals_plane(number: int) -> None:
    layout, static = scene_layout(SPEC, number), render_background(SPEC, number)
    camera = layout.camera
    rows = (np.arange(camera.height * FINE) + 0.5) / FINE
    v = (rows - camera.height / 2) / camera.focal
    plane = camera.altitude / np.maximum(np.sin(camera.pitch) + v * np.cos(camera.pitch), 1e-9)
    per_depth, _ = camera.row_terms(rows)
    depth = static.forward / per_depth[:, None]
    expected = np.broadcast_to(plane[:, None], depth.shape)[static.ground]
    np.testing.assert_allclose(depth[static.ground], expected, rtol=1e-4)
    below = static.ground[:-1] & static.ground[1:]
    assert below.any() and (np.diff(depth, axis=0)[below] < 0).all()


@pytest.mark.parametrize("index", range(8, 12))
def test_render_points_match_depth_map(index: int) -> None:
    scene, layout = render(SPEC, index), scene_layout(SPEC, index % 4)
    crowd = crowd_of(SPEC, index)
    heads = np.array(
        [[f.x + f.sprite.head[0] * f.size, f.y, f.sprite.head[1] * f.size] for f in crowd if f.sprite.head]
    )
    projected = layout.camera.project(heads)
    offset = np.hypot(*(projected[:, None, :2] - scene.points[None]).transpose(2, 0, 1))
    owner = offset.argmin(0)
    assert offset.min(0).max(initial=0) < 1e-3
    assert len(set(owner.tolist())) == len(scene.points)
    column, row = np.floor(scene.points).astype(int).T
    assert (scene.points >= 0).all() and (scene.points < [160, 120]).all()
    assert scene.roi[row, column].all()
    # The pixel of an annotated head shows the person or a nearer object that hides part of the head.
    shown, person = scene.depth[row, column], projected[owner, 2]
    assert (shown <= person * 1.01).all()
    assert (np.abs(shown - person) < 0.02 * person).mean() > 0.8


def test_people_outside_roi_need_masked_camera() -> None:
    outside = {}
    for fraction in (0.0, 1.0):
        spec = dataclasses.replace(SPEC, masked_fraction=fraction)
        outside[fraction] = 0
        for index in range(4, 12):
            layout = scene_layout(spec, index % 4)
            crowd = crowd_of(spec, index)
            raster = Raster(layout.camera, render_background(spec, index % 4).forward.copy())
            for i, figure in enumerate(crowd):
                raster.draw(figure, i)
            everyone = annotated_heads(dataclasses.replace(layout, roi=np.ones_like(layout.roi)), crowd, raster)
            assert len(everyone) >= len(annotated_heads(layout, crowd, raster))
            outside[fraction] += len(everyone) - len(annotated_heads(layout, crowd, raster))
    assert outside[0.0] == 0
    assert outside[1.0] > 0


def test_crowd_keeps_minimum_distance_and_heights() -> None:
    for index in range(8):
        crowd = crowd_of(SPEC, index)
        feet = np.array([(f.x, f.y) for f in crowd])
        gaps = np.hypot(*(feet[:, None] - feet[None]).transpose(2, 0, 1)) + 9 * np.eye(len(feet))
        assert gaps.min() > MIN_DISTANCE
        heights = [1.75 * f.size for f in crowd if f.kind == "person"]
        assert min(heights) >= 1.499 and max(heights) <= 1.901
        assert [f.y for f in crowd] == sorted((f.y for f in crowd), reverse=True)


def test_crowd_sizes_vary_at_one_camera() -> None:
    sizes = [people_in(SPEC, index) for index in range(1, 200, 4)]
    assert min(sizes) <= 10 and max(sizes) >= 150
    assert np.std(sizes) > 0.6 * np.mean(sizes)


def test_crowd_size_matches_requested_range() -> None:
    spec = dataclasses.replace(SPEC, min_people=30, max_people=30)
    for index in range(4):
        assert people_in(spec, index) == 30
    nearly_empty = dataclasses.replace(SPEC, min_people=0, max_people=1, masked_fraction=0.0)
    assert min(len(render(nearly_empty, index).points) for index in range(6)) == 0


def test_spec_reports_every_invalid_field_with_fix() -> None:
    with pytest.raises(UserError) as caught:
        SceneSpec(seed=-1, width=10, cameras=0, max_people=10**6, masked_fraction=1.5, sensor_noise=float("nan"))
    assert str(caught.value).count("use a value from") == 6
    assert "width = 10: use a value from 64 to 4096" in str(caught.value)
    with pytest.raises(UserError, match="min_people = 9: use a value from 0 to 3"):
        SceneSpec(min_people=9, max_people=3)
