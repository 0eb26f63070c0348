"""Zones: counts and areas of polygons."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdray.errors import DataError, UserError
from crowdray.pipeline.zones import Zone, Zones, ground_area, read_zones, zone_cells

SQUARE = ((10.0, 10.0), (30.0, 10.0), (30.0, 30.0), (10.0, 30.0))


def feature(name: str, ring: Any) -> dict[str, Any]:
    geometry = {"type": "Polygon", "coordinates": [ring]}
    return {"type": "Feature", "properties": {"name": name}, "geometry": geometry}


def write(path: Path, features: list[dict[str, Any]], **fields: Any) -> str:
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features, **fields}))
    return str(path)


def test_zones_that_tile_a_photo_count_each_head_once() -> None:
    rng = np.random.default_rng(0)
    density = rng.random((12, 17), dtype=np.float32)
    width, height, (x, y) = 17 * 8.0, 12 * 8.0, rng.uniform(20, 60, 2)
    corners = [(0.0, 0.0), (width, 0.0), (width, height), (0.0, height)]
    triangles = [(first, second, (x, y)) for first, second in zip(corners, corners[1:] + corners[:1], strict=True)]
    zones = Zones(tuple(Zone(str(number), (ring,), None) for number, ring in enumerate(triangles)))
    counts = zones.count(density, 8, (136, 96))
    assert list(counts) == zones.columns == [f"zone {number}" for number in range(4)]
    assert sum(filter(None, counts.values())) == pytest.approx(density.sum(), rel=1e-5)


def test_zone_cells_are_the_covered_fraction_and_leave_out_holes() -> None:
    cells = zone_cells((SQUARE,), (10, 10), 4)
    assert cells.sum() * 16 == pytest.approx(400, rel=0.02)
    assert cells[2, 2] == 0.25 and cells[5, 5] == 1 and cells[0, 0] == 0
    hole = ((16.0, 16.0), (24.0, 16.0), (24.0, 24.0), (16.0, 24.0))
    assert zone_cells((SQUARE, hole), (10, 10), 4).sum() * 16 == pytest.approx(400 - 64, rel=0.02)
    reversed_square = zone_cells((SQUARE[::-1],), (10, 10), 4)
    np.testing.assert_array_equal(cells, reversed_square)


def test_ground_area_of_a_tilted_camera_is_that_of_the_projected_polygon() -> None:
    ground = np.array([[0, 0], [5, 0], [5, 3], [0, 3]], dtype=np.float64)
    to_image = np.array([[90.0, 4.0, 50.0], [3.0, 60.0, 200.0], [0.001, 0.05, 1.0]])
    projected = np.column_stack([ground, np.ones(4)]) @ to_image.T
    ring = tuple((float(x / w), float(y / w)) for x, y, w in projected)
    assert ground_area((ring,), np.linalg.inv(to_image)) == pytest.approx(15)
    with pytest.raises(ValueError, match="horizon"):
        ground_area((((0, 0), (640, 0), (640, 480)),), np.array([[1, 0, 0], [0, 1, 0], [0, 1, -240]]))
    with pytest.raises(ValueError, match="no area"):
        ground_area((((0, 0), (1, 1), (2, 2)),), np.eye(3))


def test_read_zones_with_a_homography_gives_people_per_square_metre(tmp_path: Path) -> None:
    matrix = [[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]
    uri = write(tmp_path / "z.json", [feature("door", [*SQUARE, SQUARE[0]])], homography=matrix, size=[40, 40])
    zones = read_zones(uri)
    counts = zones.count(np.ones((10, 10), np.float32), 4, (40, 40))
    assert list(counts) == ["zone door", "zone door per m2"]
    assert counts["zone door"] == pytest.approx(25, rel=0.02)
    assert counts["zone door per m2"] == pytest.approx(25 / 100, rel=0.02)
    with pytest.raises(DataError, match="for photos of 40x40 pixels"):
        zones.count(np.ones((5, 5), np.float32), 4, (20, 20))
    with pytest.raises(DataError, match="zone door extends beyond the photo of 20x20 pixels"):
        Zones(zones.zones).count(np.ones((5, 5), np.float32), 4, (20, 20))


@pytest.mark.parametrize(
    ("features", "fields", "message"),
    [
        ([], {}, "is not a zones file: features: "),
        ([feature("a", SQUARE[:2])], {}, "is not a zones file: "),
        ([feature("a", SQUARE), feature("a", SQUARE)], {}, "two columns named 'zone a'; rename a zone"),
        ([feature("a", SQUARE)], {"homography": [[1, 0], [0, 1]]}, "is not a zones file: .*homography"),
        ([feature("a", SQUARE)], {"homography": [[1, 0, 0], [0, 1, 0], [0, 1, -20]]}, "zone 'a' reaches the horizon"),
        ([{"type": "Feature", "properties": {}, "geometry": {"type": "Point"}}], {}, "is not a zones file: "),
    ],
)
def test_read_zones_that_cannot_be_used_raises(
    features: list[dict[str, Any]], fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read_zones(write(tmp_path / "z.json", features, **fields))
