"""Street furniture and plants, many of them as tall, slim or round-topped as people.

Each function draws a random variant, with sizes in metres, and returns its sprite and palette.
"""

from functools import cache

import numpy as np

from crowdray.scenes.people import BAG, BOTTOM, CLOTH_COLOURS, SLEEVE, TOP, draw_person
from crowdray.scenes.spec import Floats, generator, linear
from crowdray.scenes.sprites import PARTS, Pen, Sprite

ColouredSprite = tuple[Sprite, Floats]
VARIANTS = 6
"""Number of variants of each kind."""

_FOLIAGE = ((38, 62, 26), (58, 88, 34), (84, 116, 48), (112, 140, 66))
_METAL = (66, 70, 74)
_WOOD = (124, 92, 62)
_STONE = (168, 160, 146)


def _palette(*colours: tuple[int, int, int] | Floats) -> Floats:
    """Return a palette of parts 1, 2, ...; colours are sRGB tuples or linear light."""
    palette = np.zeros((PARTS, 3), np.float32)
    for part, colour in enumerate(colours, start=1):
        palette[part] = linear(*colour) if isinstance(colour, tuple) else colour
    return palette


def _cloth(rng: np.random.Generator) -> Floats:
    return np.asarray(rng.choice(CLOTH_COLOURS), np.float32)


def _foliage(rng: np.random.Generator) -> Floats:
    """Return a palette: parts 1 to 4 are leaves from dark to light in a random green, part 5 is bark."""
    palette = _palette(*_FOLIAGE, (78, 62, 46))
    palette[1:5] *= rng.normal(1, 0.14, 3).clip(0.7, 1.4).astype(np.float32) * np.float32(rng.uniform(0.7, 1.15))
    return palette


def _crown(
    pen: Pen, rng: np.random.Generator, x: float, z: float, rx: float, rz: float, leaf: float, clumps: int
) -> None:
    """Draw a crown of leaf clumps, dark below and inside, light above."""
    pen.disc(x, z, rx * 0.82, rz * 0.82, 1)
    for _ in range(clumps):
        angle, radius = rng.uniform(0, 2 * np.pi), np.sqrt(rng.random())
        cx, cz = x + rx * radius * np.cos(angle), z + rz * radius * np.sin(angle)
        height = (cz - z) / rz
        part = int(np.clip(np.rint(2.3 + 1.3 * height + rng.normal(0, 0.7)), 1, 4))
        size = leaf * rng.uniform(0.6, 1.3)
        pen.disc(float(cx), float(cz), float(size), float(size * 0.8), part)


def _tree(rng: np.random.Generator) -> ColouredSprite:
    height, half_width = rng.uniform(4, 8), rng.uniform(1.3, 2.6)
    pen = Pen(half_width * 1.4, height * 1.15, 30)
    trunk = height * 0.45
    pen.limb((0, 0, 0.16), (rng.normal(0, 0.1), trunk, 0.1), part=5)
    for sign in (-1, 1):
        pen.limb((0, trunk * 0.85, 0.08), (sign * half_width * 0.5, height * 0.65, 0.04), part=5)
    _crown(pen, rng, 0, height * 0.68, half_width, height * 0.3, 0.2, 190)
    return pen.sprite(), _foliage(rng)


def _conifer(rng: np.random.Generator) -> ColouredSprite:
    height = rng.uniform(3, 7)
    pen = Pen(1.3, height + 0.5, 30)
    pen.limb((0, 0, 0.1), (0, 0.9, 0.09), part=5)
    pen.lathe([(0.5, height * 0.14), (height, 0.04)], 1)
    for _ in range(150):
        z = rng.uniform(0.5, height)
        half = height * 0.15 * (1 - (z - 0.5) / height)
        pen.disc(rng.uniform(-half, half), float(z), 0.14, 0.09, int(rng.integers(1, 4)))
    return pen.sprite(), _foliage(rng)


def _bush(rng: np.random.Generator) -> ColouredSprite:
    """A shrub of 0.7 to 1.6 m, similar to the upper half of a person."""
    height, half_width = rng.uniform(0.7, 1.6), rng.uniform(0.4, 0.9)
    pen = Pen(half_width * 1.5, height * 1.4, 60)
    _crown(pen, rng, 0, height * 0.52, half_width, height * 0.5, 0.11, 90)
    return pen.sprite(), _foliage(rng)


def _topiary(rng: np.random.Generator) -> ColouredSprite:
    """A potted tree with a ball of leaves at head height."""
    height = rng.uniform(1.35, 1.8)
    pen = Pen(0.6, 2.3, 70)
    pen.limb((0, 0.3, 0.03), (0, height - 0.1, 0.03), part=5)
    pen.lathe([(0.0, 0.15), (0.42, 0.22)], 6)
    ball = rng.uniform(0.13, 0.3)
    _crown(pen, rng, 0, height, ball, ball, 0.05, 60)
    palette = _foliage(rng)
    palette[6] = linear(150, 90, 64) if rng.random() < 0.5 else linear(*_STONE)
    return pen.sprite(), palette


def _planter(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(0.8, 1.6, 60)
    half = rng.uniform(0.35, 0.6)
    pen.lathe([(0, half * 0.85), (0.5, half)], 6)
    _crown(pen, rng, 0, 0.62, half * 0.9, 0.25, 0.08, 50)
    for _ in range(26):
        pen.disc(float(rng.uniform(-half, half) * 0.85), rng.uniform(0.55, 0.88), 0.035, 0.035, 7)
    palette = _foliage(rng)
    palette[6], palette[7] = linear(*_STONE), _cloth(rng)
    return pen.sprite(), palette


def _lamp(rng: np.random.Generator) -> ColouredSprite:
    height = rng.uniform(3.5, 7)
    pen = Pen(1.6, height + 0.6, 40)
    pen.limb((0, 0, 0.075), (0, height, 0.05), part=1)
    pen.lathe([(0, 0.14), (0.5, 0.09)], 1)
    if rng.random() < 0.5:
        pen.limb((0, height, 0.045), (1.1, height + 0.25, 0.035), part=1)
        pen.disc(1.1, height + 0.2, 0.3, 0.09, 2)
    else:
        pen.limb((-0.4, height - 0.1, 0.03), (0.4, height - 0.1, 0.03), part=1)
        for x in (-0.42, 0.42):
            pen.disc(x, height + 0.08, 0.18, 0.2, 2)
    return pen.sprite(), _palette(_METAL, (226, 222, 206))


def _globe(rng: np.random.Generator) -> ColouredSprite:
    """A low lamp with a globe on a post, similar to a head on a thin body."""
    height = rng.uniform(1.3, 2.0)
    pen = Pen(0.4, 2.5, 70)
    pen.limb((0, 0, 0.05), (0, height - 0.1, 0.04), part=1)
    pen.disc(0, height, 0.14, 0.15, 2)
    return pen.sprite(), _palette(_METAL, (214, 206, 186) if rng.random() < 0.6 else (60, 62, 66))


def _bollard(rng: np.random.Generator) -> ColouredSprite:
    height = rng.uniform(0.8, 1.2)
    pen = Pen(0.25, 1.5, 80)
    pen.lathe([(0, 0.1), (height - 0.1, 0.075)], 1)
    pen.disc(0, height - 0.08, 0.1, 0.1, 1)
    pen.box(-0.085, 0.085, height * 0.65, height * 0.75, 2)
    return pen.sprite(), _palette(_METAL if rng.random() < 0.6 else (120, 40, 36), (214, 210, 200))


def _bin(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(0.5, 1.5, 60)
    height = rng.uniform(0.85, 1.15)
    pen.lathe([(0, 0.25), (height, 0.29)], 1)
    pen.disc(0, height, 0.3, 0.13, 2, above=height)
    pen.box(-0.14, 0.14, height * 0.72, height * 0.84, 3)
    colour = [(52, 74, 54), (60, 62, 66), (40, 66, 104)][int(rng.integers(3))]
    return pen.sprite(), _palette(colour, (44, 46, 48), (18, 18, 20))


def _pillar(rng: np.random.Generator) -> ColouredSprite:
    """A post box or an advertising pillar, as tall as a person."""
    height, half = rng.uniform(1.4, 1.8), rng.uniform(0.2, 0.3)
    pen = Pen(0.6, 2.3, 60)
    pen.lathe([(0, half), (height - 0.15, half)], 1)
    pen.lathe([(0, half * 1.1), (0.16, half * 1.1)], 3)
    pen.disc(0, height - 0.16, half * 1.1, 0.17, 2, above=height - 0.16)
    pen.box(-0.1, 0.1, height * 0.72, height * 0.76, 3)
    colour = [(168, 34, 34), (196, 164, 48), (44, 64, 96)][int(rng.integers(3))]
    return pen.sprite(), _palette(colour, colour, (24, 24, 26))


def _statue(rng: np.random.Generator) -> ColouredSprite:
    person = draw_person(rng)
    plinth = rng.uniform(0.5, 1.3)
    pen = Pen(0.8, plinth + 0.1, person.scale)
    pen.lathe([(0, 0.6), (0.15, 0.6), (0.16, 0.48), (plinth - 0.1, 0.46), (plinth - 0.09, 0.54), (plinth, 0.54)], 1)
    base = pen.sprite()
    pixels = base.texels
    left, right = (max(person.foot, base.foot), max(person.texels.shape[1] - person.foot, pixels.shape[1] - base.foot))
    whole = np.zeros((person.texels.shape[0] + pixels.shape[0], int(left + right) + 2), np.int32)
    column = int(left - person.foot) + 1
    whole[: person.texels.shape[0], column : column + person.texels.shape[1]] = person.texels
    column = int(left - base.foot) + 1
    whole[person.texels.shape[0] :, column : column + pixels.shape[1]] = pixels
    outline = np.concatenate([base.outline[::4], person.outline[3:] + np.array([plinth, 0, 0], np.float32)])
    stone = linear(*_STONE) * np.float32(0.8) if rng.random() < 0.5 else linear(78, 92, 80)
    palette = np.broadcast_to(stone, (PARTS, 3)) * rng.uniform(0.92, 1.05, (PARTS, 1)).astype(np.float32)
    return Sprite(whole, person.scale, left + 1, outline), palette.astype(np.float32)


def _mannequin(rng: np.random.Generator) -> ColouredSprite:
    """A shop mannequin: dressed, with a featureless pale head."""
    sprite = draw_person(rng)
    pale = linear(*[(214, 206, 194), (190, 186, 180), (36, 36, 38)][int(rng.integers(3))])
    palette = np.broadcast_to(pale, (PARTS, 3)).copy()
    for part in (TOP, SLEEVE, BOTTOM, BAG):
        palette[part] = _cloth(rng)
    return Sprite(sprite.texels, sprite.scale, sprite.foot, sprite.outline), palette


def _coats(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(0.5, 2.1, 70)
    pen.limb((0, 0, 0.03), (0, 1.6, 0.03), part=1)
    pen.limb((-0.22, 0.02, 0.025), (0, 0.15, 0.03), (0.22, 0.02, 0.025), part=1)
    pen.lathe([(0.45, 0.24), (1.3, 0.21), (1.42, 0.18), (1.48, 0.05)], 2)
    if rng.random() < 0.6:
        pen.disc(0, 1.58, 0.11, 0.1, 3, above=1.55)
        pen.disc(0, 1.56, 0.18, 0.03, 3)
    return pen.sprite(), _palette(_WOOD, _cloth(rng), _cloth(rng))


def _bicycle(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(1.0, 1.3, 70)
    for x in (-0.52, 0.52):
        pen.ring(x, 0.34, 0.34, 0.045, 1)
    frame = [(-0.52, 0.34, 0.018), (-0.1, 0.3, 0.02), (0.4, 0.78, 0.02), (0.52, 0.34, 0.018)]
    pen.limb(*frame, part=2)
    pen.limb((-0.52, 0.34, 0.018), (-0.2, 0.76, 0.02), (0.4, 0.76, 0.02), part=2)
    pen.limb((-0.1, 0.3, 0.02), (-0.22, 0.9, 0.018), part=2)
    pen.limb((0.4, 0.76, 0.018), (0.36, 1.0, 0.016), (0.22, 1.02, 0.02), part=3)
    pen.disc(-0.22, 0.92, 0.13, 0.045, 3)
    if rng.random() < 0.4:
        pen.box(0.4, 0.7, 0.72, 0.98, 4)
    return pen.sprite(), _palette((30, 30, 32), _cloth(rng), (40, 34, 30), _WOOD)


def _bench(rng: np.random.Generator) -> ColouredSprite:
    half = rng.uniform(0.7, 1.0)
    pen = Pen(1.1, 1.2, 60)
    for x in (-half * 0.8, half * 0.8):
        pen.limb((x, 0, 0.04), (x, 0.8, 0.035), part=1)
    for z in (0.56, 0.68, 0.8):
        pen.box(-half, half, z - 0.045, z + 0.045, 2, up=0.3)
    pen.box(-half, half, 0.38, 0.48, 3, up=0.9)
    return pen.sprite(), _palette(_METAL, _WOOD, (150, 114, 78))


def _parasol(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(1.7, 3.0, 45)
    for x in (-0.75, 0.75):
        pen.box(x - 0.22, x + 0.22, 0.4, 0.48, 3, up=0.8)
        pen.box(x - 0.22 if x < 0 else x + 0.17, x - 0.17 if x < 0 else x + 0.22, 0.0, 0.88, 3)
        pen.box(x + 0.17 if x < 0 else x - 0.22, x + 0.22 if x < 0 else x - 0.17, 0.0, 0.42, 3)
    pen.limb((0, 0, 0.04), (0, 2.3, 0.03), part=1)
    pen.disc(0, 0.74, 0.5, 0.06, 4)
    half = rng.uniform(1.1, 1.5)
    for i in range(6):
        x0, x1 = -half + 2 * half * i / 6, -half + 2 * half * (i + 1) / 6
        pen.lathe([(2.0, half), (2.1, half * 0.98), (2.55, half * 0.1), (2.62, 0.02)], 2, up=0.5)
        pen.limb(((x0 + x1) / 2, 2.08, half / 6), (0, 2.55, 0.02), part=2 + 3 * (i % 2))
    cloth = _cloth(rng)
    stripes = (232, 228, 218) if rng.random() < 0.6 else cloth * 0.85
    return pen.sprite(), _palette(_METAL, cloth, _WOOD, (196, 190, 178), stripes)


def _board(rng: np.random.Generator) -> ColouredSprite:
    """An advertising board, often with a face."""
    pen = Pen(0.6, 1.9, 60)
    height = rng.uniform(1.0, 1.7)
    pen.box(-0.36, 0.36, 0.05, height, 1)
    pen.box(-0.31, 0.31, 0.14, height - 0.06, 2, up=0.2)
    if rng.random() < 0.6:
        pen.lathe([(0.16, 0.24), (height * 0.45, 0.2), (height * 0.52, 0.06)], 4)
        pen.disc(0, height * 0.66, 0.13, 0.17, 5)
        pen.disc(0, height * 0.7, 0.12, 0.14, 6, above=height * 0.74)
    else:
        for z in np.arange(0.3, height - 0.2, 0.14):
            pen.box(-0.22, rng.uniform(0, 0.24), float(z), float(z) + 0.06, 4)
    paper, ink = _cloth(rng), _cloth(rng)
    return pen.sprite(), _palette((50, 44, 40), paper, (0, 0, 0), ink, (214, 166, 136), (44, 32, 26))


def _cone(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(0.3, 0.9, 70)
    pen.box(-0.2, 0.2, 0, 0.05, 1)
    pen.lathe([(0.04, 0.15), (0.7, 0.03)], 1)
    pen.lathe([(0.3, 0.108), (0.46, 0.078)], 2)
    return pen.sprite(), _palette((216, 92, 34), (232, 230, 224))


def _balloons(rng: np.random.Generator) -> ColouredSprite:
    """A bunch of balloons, each as large as a head."""
    pen = Pen(0.9, 2.9, 60)
    for _ in range(int(rng.integers(5, 12))):
        x, z = rng.normal(0, 0.28), rng.uniform(1.5, 2.4)
        pen.limb((0, 0.95, 0.008), (x, z, 0.008), part=1)
        pen.disc(x, z, 0.12, 0.15, int(rng.integers(2, 7)))
    pen.lathe([(0, 0.3), (0.95, 0.3)], 7)
    return pen.sprite(), _palette((190, 190, 190), *(_cloth(rng) for _ in range(6)))


def _kiosk(rng: np.random.Generator) -> ColouredSprite:
    pen = Pen(1.7, 3.1, 45)
    pen.box(-1.4, 1.4, 0, 2.5, 1)
    pen.box(-1.2, 1.2, 1.05, 2.0, 2)
    pen.box(-1.35, 1.35, 0.95, 1.06, 3, up=0.7)
    for i in range(12):
        pen.box(-1.5 + 0.25 * i, -1.25 + 0.25 * i, 1.95, 2.35, 4 + i % 2, up=0.6)
    pen.box(-1.5, 1.5, 2.35, 2.8, 6, up=0.1)
    for _ in range(14):
        pen.disc(rng.uniform(-1.1, 1.1), rng.uniform(1.12, 1.5), 0.09, 0.11, int(rng.integers(7, 10)))
    front, awning, *others = (_cloth(rng) for _ in range(6))
    return pen.sprite(), _palette(front, (34, 30, 28), (170, 150, 120), awning, (232, 228, 220), *others)


_FIXED = (_tree, _conifer, _bush, _lamp, _bollard, _statue, _bench, _parasol, _kiosk)
_MOVABLE = (
    *(_topiary, _planter, _globe, _bin, _pillar, _mannequin),
    *(_coats, _bicycle, _board, _cone, _balloons),
)
PROP_KINDS = {draw.__name__.strip("_"): draw for draw in _FIXED + _MOVABLE}
MOVABLE_KINDS = tuple(draw.__name__.strip("_") for draw in _MOVABLE)
"""Kinds that move from image to image, so that a model cannot memorize their positions."""


@cache
def prop_variants(kind: str) -> tuple[ColouredSprite, ...]:
    """Return the variants of one kind; the same in every process and for every seed."""
    key = sorted(PROP_KINDS).index(kind)
    return tuple(PROP_KINDS[kind](generator(0xC1, key, number)) for number in range(VARIANTS))
