"""Albedo of large surfaces: paving, asphalt, grass, facades, sky; pure functions of coordinates and salt.

Detail fades where it is smaller than a pixel's footprint, so that distant paving does not alias.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from crowdray.scenes.spec import Bools, Floats, generator, hex_colours, linear

_TABLE = 256
WALL_COLOURS = hex_colours("b2a28a 965c48 c4beb2 a89478 7e7a76 ccba96 8c9296")

_SPECKLES = {"asphalt": ((96, 96, 98), 0.22, 0.05, 0.08), "gravel": ((178, 160, 128), 0.3, 0.07, 0.1)}
"""Colour, contrast, size of a speckle and size at which it fades, in metres."""

Reals = npt.NDArray[np.floating]


@lru_cache(maxsize=1)
def _lattice() -> Floats:
    return generator(0x7AB1E).random((_TABLE, _TABLE), np.float32)


def noise(x: Reals, y: Reals, size: float) -> Floats:
    """Return smooth noise in [0, 1] with a feature size of `size` metres."""
    at = np.stack([np.mod(x / size, _TABLE - 1), np.mod(y / size, _TABLE - 1)])
    return np.asarray(ndimage.map_coordinates(_lattice(), at, order=1, mode="nearest"), np.float32)


def cell(i: npt.NDArray[np.int64], j: npt.NDArray[np.int64], salt: int = 0) -> Floats:
    """Return a random number in [0, 1) for each integer cell."""
    row, column = (i * 7 + j * 131 + salt * 61) % _TABLE, (j * 5 - i * 83 + salt * 29) % _TABLE
    return np.asarray(_lattice()[row, column], np.float32)


def _fade(detail: float, footprint: Floats) -> Floats:
    """Return a weight: 1 where a pixel is much smaller than the detail, 0 where it is larger."""
    return np.clip(1.6 * detail / np.maximum(footprint, 1e-4) - 0.6, 0, 1)


def _tiles(
    s: Floats,
    t: Floats,
    footprint: Floats,
    tile: tuple[float, float],
    joint: float,
    variation: float,
    salt: int,
    stagger: bool = False,
) -> Floats:
    """Return the relative brightness of tiles with dark joints."""
    j = np.floor(t / tile[1]).astype(np.int64)
    across = s / tile[0] + (0.5 * (j % 2) if stagger else 0)
    i = np.floor(across).astype(np.int64)
    edge_s, edge_t = np.abs(across - i - 0.5), np.abs(t / tile[1] - j - 0.5)
    dark = (edge_s > 0.5 - joint / tile[0] / 2) | (edge_t > 0.5 - joint / tile[1] / 2)
    shade = 1 + variation * (cell(i, j, salt) - 0.5) * _fade(min(tile), footprint)
    return np.asarray(shade * (1 - 0.45 * dark * _fade(3 * joint, footprint)), np.float32)


def ground(kind: str, s: Floats, t: Floats, footprint: Floats, salt: int) -> Floats:
    """Return the albedo (N, 3) of a ground at s, t (N,); `footprint` (N,) is in metres per pixel."""
    rng = generator(0x6A0, salt)
    stain = 1 + 0.16 * (noise(s, t, 2.7) - 0.5) + 0.14 * (noise(t + 31, s, 9.0) - 0.5)
    grain = 1 + 0.1 * (noise(s, t, 0.09) - 0.5) * _fade(0.12, footprint)
    tone = np.float32(rng.uniform(0.75, 1.15))
    if kind == "grass":
        blades = 1 + 0.5 * (noise(s, t, 0.13) - 0.5) * _fade(0.16, footprint) + 0.3 * (noise(s, t, 0.8) - 0.5)
        dry = np.clip(noise(s, t, 3.1) * 1.6 - 0.7, 0, 1)[:, None]
        base = linear(78, 104, 44) * (1 - dry) + linear(140, 132, 78) * dry
        return np.asarray(base * (blades * stain * tone)[:, None], np.float32)
    if kind == "water":
        ripple = 1 + 0.5 * (noise(s, t * 3, 0.6) - 0.5)
        return np.asarray(linear(70, 98, 112) * ripple[:, None], np.float32)
    if kind in _SPECKLES:
        base, strength, detail, fade = _SPECKLES[kind]
        speckle = 1 + strength * (noise(s, t, detail) - 0.5) * _fade(fade, footprint)
        return np.asarray(linear(*base) * (speckle * stain * tone)[:, None], np.float32)
    if kind == "cobbles":
        shade = _tiles(s, t, footprint, (0.16, 0.13), 0.02, 0.5, salt, stagger=True)
        return np.asarray(linear(128, 122, 116) * (shade * stain * tone)[:, None], np.float32)
    if kind == "brick":
        shade = _tiles(s, t, footprint, (0.5, 0.25), 0.02, 0.35, salt, stagger=True)
        return np.asarray(linear(158, 112, 92) * (shade * stain * grain * tone)[:, None], np.float32)
    size = float(rng.choice([0.5, 0.8, 1.2]))
    shade = _tiles(s, t, footprint, (size, size), 0.025, 0.16, salt)
    base = hex_colours("b0a89a a0a0a0 baac96")[int(rng.integers(3))]
    period = int(rng.integers(4, 9))
    i, j = np.floor(s / size).astype(np.int64), np.floor(t / size).astype(np.int64)
    pattern = {
        0: (i % period == 0) | (j % period == 0),
        1: (i // 2 + j // 2) % 2 == 0,
        2: (i + j) % period == 0,
        3: j % period == 0,
    }[int(rng.integers(4))]
    contrast = rng.uniform(0.25, 0.5) * _fade(size * 2, footprint) + 0.0
    return np.asarray(base * (shade * stain * grain * tone * (1 - contrast * pattern))[:, None], np.float32)


def markings(kind: str, s: Floats, t: Floats) -> Bools:
    """Return where a road along s has white paint; t is measured from its centre line."""
    if kind == "zebra":
        return np.asarray((np.abs(s) < 2.2) & (np.mod(t, 1.0) < 0.5))
    return np.asarray((np.abs(t) < 0.07) & (np.mod(s, 4.0) < 2.0))


def ragged_top(kind: str, along: Reals, height: float) -> Floats:
    """Return the height of a wall at positions along it: constant for buildings and hedges, crowns for woods."""
    if kind != "woods":
        return np.full(along.shape, height, np.float32)
    top = 0.2 * noise(along, np.zeros_like(along), 0.7)
    for shift, broad in ((0.0, 5.5), (0.5, 5.5), (0.2, 3.1)):
        at = along / broad + shift
        tree = np.floor(at).astype(np.int64)
        dome = np.sqrt(1 - (2 * (at - tree) - 1) ** 2)
        top = np.maximum(top, (0.55 + 0.45 * cell(tree, tree * 0 + int(shift * 10), 3)) * dome + 0.08 * top)
    return np.asarray(height * (0.25 + 0.9 * top), np.float32)


def facade(kind: str, along: Floats, z: Floats, height: float, salt: int, night: bool) -> tuple[Floats, Floats]:
    """Return albedo (N, 3) and emission (N,) of a wall at positions along it and heights z (N,), in metres."""
    if kind in ("hedge", "woods"):
        clump = 0.5 if kind == "hedge" else 1.6
        leaf = 0.5 + 0.9 * noise(along, z, clump / 3) * (0.4 + 0.6 * noise(along + 7, z, clump)) + 0.25 * z / height
        return np.asarray(linear(56, 82, 38) * leaf[:, None], np.float32), np.zeros(len(along), np.float32)
    rng = generator(0xFACADE, salt)
    wall = WALL_COLOURS[int(rng.integers(len(WALL_COLOURS)))] * np.float32(rng.uniform(0.75, 1.1))
    shade = 0.9 + 0.2 * noise(along, z, 1.9)
    if rng.random() < 0.4:
        shade = shade * _tiles(along, z, np.full(len(z), 0.06, np.float32), (0.6, 0.3), 0.03, 0.2, salt, stagger=True)
    colour = wall * shade[:, None]
    light = np.zeros(len(along), np.float32)
    bay, storey, street = rng.uniform(2.2, 3.8), rng.uniform(3.0, 3.7), rng.uniform(3.6, 4.6)
    up = (z - street) / storey
    i, j = np.floor(along / bay).astype(np.int64), np.floor(up).astype(np.int64)
    u, v = along / bay - i, up - j
    half, low, high = rng.uniform(0.2, 0.42), rng.uniform(0.12, 0.3), rng.uniform(0.76, 0.9)
    upper = (z > street) & (z < height - 0.7)
    frame = upper & (np.abs(u - 0.5) < half + 0.03) & (v > low - 0.04) & (v < high + 0.03)
    glass = upper & (np.abs(u - 0.5) < half) & (v > low) & (v < high) & (np.abs(u - 0.5) > 0.012)
    lit = cell(i, j, salt)
    colour[frame] = linear(214, 210, 200) * 0.8
    mirror = (0.25 + 0.9 * lit * (v - low))[:, None] * linear(120, 140, 160)
    colour[glass] = mirror[glass]
    light[glass & (lit > (0.45 if night else 0.93))] = 0.9 if night else 0.0
    colour[(z > height - 0.5) | (np.abs(z - street) < 0.12)] = wall * 1.2
    _shops(colour, light, along, z, street, bay * 2, salt, night)
    return np.asarray(colour, np.float32), light


def _shops(
    colour: Floats, light: Floats, along: Floats, z: Floats, street: float, span: float, salt: int, night: bool
) -> None:
    """Paint shop fronts: glass between pillars, a sign band and some awnings."""
    k = np.floor(along / span).astype(np.int64)
    u = along / span - k
    which, style = cell(k, k * 0, salt + 1), cell(k, k * 0 + 3, salt + 2)
    ground_floor = z < street - 0.12
    glass = ground_floor & (np.abs(u - 0.5) < 0.44) & (z > 0.35) & (z < street * 0.72)
    mirror = np.clip(noise(along + z, z - along, 1.6) * 1.4 - 0.3, 0, 1) * (0.3 + 0.5 * z / street)
    colour[glass] = (linear(58, 60, 64) * 0.7 + linear(150, 166, 180) * mirror[:, None])[glass]
    _mannequins(colour, glass, along, z, salt)
    colour[glass & (np.abs(u - 0.75) < 0.09)] = linear(40, 36, 34)
    mullion = glass & (np.mod(along, span / 4) < 0.06)
    colour[mullion] = linear(60, 58, 56)
    light[glass] = float(night) * (0.4 + 0.6 * which[glass])
    sign = ground_floor & (np.abs(u - 0.5) < 0.46) & (z > street * 0.76) & (z < street * 0.93)
    hue = np.stack([which, cell(k, k * 0 + 1, salt), cell(k, k * 0 + 2, salt)], 1)
    colour[sign] = (0.03 + 0.5 * hue[sign] ** 2.5).astype(np.float32)
    letters = (
        sign
        & (np.abs(u - 0.5) < 0.3)
        & (np.abs(z / street - 0.845) < 0.04)
        & (cell((along / 0.16).astype(np.int64), k, 5) > 0.35)
    )
    colour[letters] = linear(236, 232, 220)
    awning = ground_floor & (style > 0.55) & (np.abs(u - 0.5) < 0.47) & (z > street * 0.58) & (z < street * 0.76)
    stripe = np.mod(along, 0.6) < 0.3
    colour[awning & stripe] = linear(226, 220, 206)
    colour[awning & ~stripe] = (0.04 + 0.4 * hue[awning & ~stripe] ** 2).astype(np.float32)
    light[awning] = 0.0


def _mannequins(colour: Floats, glass: Bools, along: Floats, z: Floats, salt: int) -> None:
    """Paint life-size mannequins behind the glass."""
    spot = np.floor(along / 1.3).astype(np.int64)
    across = along - (spot + 0.5) * 1.3
    shown = glass & (cell(spot, spot * 0, salt + 7) > 0.35)
    hue = np.stack([cell(spot, spot * 0 + k, salt + 8) for k in range(3)], 1)
    body = shown & (np.abs(across) < 0.2 - 0.06 * np.abs(z - 1.35)) & (z > 0.7) & (z < 1.62)
    colour[body] = (0.02 + 0.5 * hue[body] ** 2).astype(np.float32)
    colour[shown & (np.abs(np.abs(across) - 0.07) < 0.05) & (z <= 0.7)] = linear(60, 58, 60)
    colour[shown & ((across / 0.1) ** 2 + ((z - 1.74) / 0.13) ** 2 < 1)] = linear(206, 188, 168)


def sky(down: Floats, across: Floats, cloud: float, night: bool, salt: int) -> Floats:
    """Return the radiance (N, 3) of the sky along rays with slopes (N,); down is negative above the horizon."""
    up = np.maximum(-down, np.float32(0))
    low = np.exp(-3 * up)[:, None]
    if night:
        return np.asarray(linear(34, 42, 66) * np.sqrt(low) + linear(52, 38, 33) * low**2.5, np.float32)
    x, y = across / (up + np.float32(0.25)), 1 / (up + np.float32(0.25))
    shift = np.float32(salt)
    puff = 0.6 * noise(x * 3 + shift, y * np.float32(2.5), 1.0) + 0.4 * noise(x * 9, y * 6 + shift, 1.0)
    cover = np.clip((puff - 1 + cloud) * 4 + 0.5, 0, 1)[:, None]
    blue = linear(98, 142, 196) * (1 - low) + linear(208, 216, 222) * low
    grey = linear(218, 220, 222) * (0.85 + 0.15 * puff)[:, None]
    return np.asarray(blue * (1 - cover) + grey * cover, np.float32)
