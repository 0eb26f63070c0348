"""Sprites of people in many poses, and palettes of their clothes.

A pose is drawn at a height of 1.75 m and scaled to each person, so a head's width is 0.11 of the height.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from crowdray.scenes.spec import Floats, generator, hex_colours, linear
from crowdray.scenes.sprites import PARTS, Pen, Sprite

FACE, HAIR, HAT, BEARD, SKIN, TOP, SLEEVE, BOTTOM, SHOE, BAG = range(1, 11)
TRAIL, ACCENT, CANOPY, INNER, METAL = range(11, 16)
HEAD_PARTS = (FACE, HAIR, HAT, BEARD)
"""The visible parts of a head."""

POSE_HEIGHT = 1.75
HEAD_CENTRE = 1.628
HEAD_WIDTH = 0.19
"""Width in metres of a head at POSE_HEIGHT."""
POSES = 224
SCALE = 80.0


@lru_cache(maxsize=1)
def person_sprites() -> tuple[Sprite, ...]:
    """Return all poses and their mirror images; the same in every process and for every seed."""
    rng = generator(0x9E0F1E)
    poses = [draw_person(rng) for _ in range(POSES)]
    return tuple(sprite for pose in poses for sprite in (pose, pose.mirrored()))


@dataclass(frozen=True, slots=True)
class Pose:
    """Parameters of the drawing of a person."""

    side: float
    """0 for front or back view, 1 for profile to the right."""
    back: bool
    wide: float
    """Visible width of the body; 1 is an average person from the front."""
    stride: float
    """Phase of the walk in [-1, 1]; 0 is standing."""
    lean: float
    """Horizontal offset in metres of the shoulders from the feet."""
    cut: str
    bare_arms: bool
    carried: str


_CUTS = {"trousers": 0.42, "coat": 0.16, "skirt": 0.08, "dress": 0.1, "shorts": 0.1, "hoodie": 0.14}
_CARRIED = {"none": 0.47, "pack": 0.17, "handbag": 0.15, "shopping": 0.12, "trolley": 0.05, "umbrella": 0.04}
_HAIR = {"short": 0.4, "long": 0.2, "bun": 0.08, "bald": 0.06, "cap": 0.12, "hat": 0.07, "scarf": 0.07}


def _one_of(rng: np.random.Generator, chances: dict[str, float]) -> str:
    return str(rng.choice(list(chances), p=list(chances.values())))


def draw_person(rng: np.random.Generator) -> Sprite:
    """Draw a person with a random pose, clothes, hair and luggage."""
    side = float(rng.choice([0.0, 0.45, 1.0], p=[0.45, 0.25, 0.3]))
    stride = rng.uniform(-1, 1) if rng.random() < 0.6 else rng.normal(0, 0.12)
    cut = _one_of(rng, _CUTS)
    pose = Pose(
        side=side,
        back=bool(rng.random() < 0.5),
        wide=(1 - 0.36 * side) * rng.normal(1.0, 0.09),
        stride=stride,
        lean=0.02 * side * abs(stride) + rng.normal(0, 0.008),
        cut=cut,
        bare_arms=bool(rng.random() < (0.0 if cut in ("coat", "hoodie") else 0.45)),
        carried=_one_of(rng, _CARRIED),
    )
    head = (pose.lean + 0.035 * side + rng.normal(0, 0.008), HEAD_CENTRE + rng.normal(0, 0.004))
    pen = Pen(0.85, 2.4, SCALE)
    _arm(pen, rng, pose, -1)
    _legs(pen, pose)
    _torso(pen, rng, pose)
    _arm(pen, rng, pose, 1)
    pen.limb((pose.lean, 1.45, 0.055), (head[0] * 0.8, 1.55, 0.05), part=SKIN)
    _carried(pen, pose)
    _head(pen, rng, pose, head)
    if pose.carried == "umbrella":
        pen.limb((0.16, 1.1, 0.012), (0.1, 1.95, 0.012), part=METAL)
        pen.disc(0.1, 1.8, 0.56, 0.36, CANOPY, above=1.82)
    return pen.sprite(head)


def _legs(pen: Pen, pose: Pose) -> None:
    wide, side, stride, cut = pose.wide, pose.side, pose.stride, pose.cut
    bare = cut in ("skirt", "dress", "shorts")
    for sign in (-1, 1):
        swing = 0.42 * stride * sign
        hip = 0.082 * wide * sign * (1 - 0.6 * side)
        lateral, lift = np.sin(swing) * side, max(0.0, -swing) * 0.16
        knee = (hip + 0.45 * lateral, 0.49 + lift * 0.4)
        trail = -0.16 * max(0.0, -swing * sign * stride) if side else 0.0
        ankle = (knee[0] + 0.42 * lateral + trail * side, 0.08 + lift)
        pen.limb((hip, 0.9, 0.088), (knee[0], knee[1], 0.062), part=BOTTOM)
        pen.limb((knee[0], knee[1], 0.06 if not bare else 0.052), (*ankle, 0.045), part=SKIN if bare else BOTTOM)
        pen.limb(
            (ankle[0], ankle[1] - 0.03, 0.042),
            (ankle[0] + 0.15 * side + 0.02 * sign, ankle[1] - 0.045, 0.035),
            part=SHOE,
        )


def _torso(pen: Pen, rng: np.random.Generator, pose: Pose) -> None:
    wide, cut, lean = pose.wide, pose.cut, pose.lean
    chest = [
        (1.05, 0.138 * wide),
        (1.18, 0.15 * wide),
        (1.32, 0.188 * wide),
        (1.42, 0.198 * wide),
        (1.47, 0.15 * wide),
        (1.51, 0.06),
    ]
    if cut == "skirt":
        pen.lathe([(0.5, 0.2 * wide), (1.06, 0.13 * wide)], BOTTOM, up=0.0)
    if cut == "shorts":
        pen.lathe([(0.56, 0.17 * wide), (1.0, 0.15 * wide)], BOTTOM, up=0.0)
    hem = {"coat": (0.5, 0.21), "dress": (0.48, 0.23), "hoodie": (0.88, 0.175)}.get(cut, (0.9, 0.162))
    pen.lathe([(hem[0], hem[1] * wide), *chest], TOP, x=lean * 0.6)
    if not pose.back and rng.random() < 0.4:
        pen.lathe([(hem[0], 0.03 * wide), (1.2, 0.045 * wide), (1.46, 0.055 * wide)], INNER, x=lean * 0.6, up=0.1)
    if rng.random() < 0.14:
        pen.lathe([(1.43, 0.11), (1.5, 0.1), (1.56, 0.07)], ACCENT, x=lean)


def _arm(pen: Pen, rng: np.random.Generator, pose: Pose, sign: int) -> None:
    wide, side, swing = pose.wide, pose.side, pose.stride * sign
    shoulder = (pose.lean * 0.8 + 0.19 * wide * sign * (1 - 0.7 * side), 1.42)
    gesture = rng.random()
    if gesture < 0.62 or pose.carried in ("shopping", "trolley"):
        upper = 0.12 * sign * (1 - side) + 0.4 * swing * side
        fore = upper + 0.15 * side + 0.05 * sign * (1 - side)
    elif gesture < 0.82:  # hands in pockets, or folded
        upper, fore = 0.3 * sign * (1 - side) - 0.2 * side, -0.45 * sign * (1 - side) + 0.9 * side
    elif gesture < 0.96:  # holding a phone, a cup, a child's hand
        upper, fore = 0.15 * sign * (1 - side) + 0.2 * side, (1 - side) * -0.8 * sign + 1.9 * side
    else:  # waving, pointing
        upper, fore = 1.1 * (sign if side == 0 else 1), 2.4 * (sign if side == 0 else 1)
    elbow = (shoulder[0] + 0.27 * np.sin(upper), shoulder[1] - 0.27 * np.cos(upper))
    hand = (elbow[0] + 0.26 * np.sin(fore), elbow[1] - 0.26 * np.cos(fore))
    pen.limb((*shoulder, 0.062), (*elbow, 0.046), part=SLEEVE)
    pen.limb((*elbow, 0.043), (*hand, 0.034), part=SKIN if pose.bare_arms else SLEEVE)
    pen.disc(hand[0], hand[1], 0.04, 0.045, SKIN)
    if pose.carried == "shopping" and sign == 1:
        pen.box(hand[0] - 0.13, hand[0] + 0.13, hand[1] - 0.42, hand[1] - 0.08, BAG)


def _carried(pen: Pen, pose: Pose) -> None:
    wide, side, lean = pose.wide, pose.side, pose.lean
    if pose.carried == "pack":
        if side >= 0.9:
            pen.disc(lean - 0.2, 1.24, 0.12, 0.22, BAG)
        elif pose.back:
            pen.disc(lean, 1.24, 0.15, 0.23, BAG)
        else:
            for sign in (-1, 1):
                pen.limb((lean + 0.12 * sign * wide, 1.46, 0.022), (lean + 0.13 * sign * wide, 1.15, 0.02), part=BAG)
    elif pose.carried == "handbag":
        pen.limb((-0.12 * wide, 1.46, 0.014), (0.2 * wide, 1.0, 0.014), part=BAG)
        pen.disc(0.22 * wide, 0.93, 0.12, 0.11, BAG)
    elif pose.carried == "trolley":
        pen.limb((0.3, 0.6, 0.012), (0.24, 0.95, 0.012), part=METAL)
        pen.box(0.2, 0.5, 0.06, 0.62, BAG)


def _head(pen: Pen, rng: np.random.Generator, pose: Pose, head: tuple[float, float]) -> None:
    side, back = pose.side, pose.back
    x, z = head
    hood = pose.cut == "hoodie" and rng.random() < 0.3
    style = "scarf" if hood else _one_of(rng, _HAIR)
    towards = 0.03 * side
    if style == "long":
        pen.lathe([(1.4, 0.095), (1.5, 0.1), (1.62, 0.098)], TRAIL, x=x - towards)
    pen.disc(x, z, 0.093, 0.122, FACE if style == "bald" else HAIR if style != "scarf" else HAT)
    if style == "scarf":
        pen.lathe([(1.44, 0.13), (1.53, 0.095), (1.56, 0.094)], ACCENT, x=x)
    if not back or side >= 0.9:
        pen.disc(x + towards, z - 0.02, 0.074 - 0.01 * side, 0.098, FACE)
        if style == "short" and rng.random() < 0.25:
            pen.disc(x + towards, z - 0.075, 0.055, 0.045, BEARD)
    elif side > 0:
        pen.disc(x + 0.055, z - 0.025, 0.04, 0.075, FACE)
    if style == "bun":
        pen.disc(x - 2 * towards, z + 0.115, 0.048, 0.045, HAIR)
    elif style == "cap":
        pen.disc(x, z + 0.005, 0.099, 0.124, HAT, above=z + 0.03)
        if not back:
            pen.limb((x + towards, z + 0.038, 0.018), (x + 4.2 * towards, z + 0.03, 0.016), part=HAT)
    elif style == "hat":
        pen.disc(x, z + 0.03, 0.098, 0.125, HAT, above=z + 0.05)
        pen.disc(x, z + 0.055, 0.185, 0.03, HAT)


HAIR_COLOURS = hex_colours("161210 1e1814 342418 543a24 806038 ac8c58 969491 cdcbc6 682c1a 28282c")
SKIN_COLOURS = hex_colours("ecc6ac e0b292 ce9a76 b27c58 885a3e 5c3c2a f2d2be")
CLOTH_COLOURS = hex_colours(
    "1c1d21 2c303a 1e2642 3e4248 606468 d6d4ce eeece6 961e22 ba342c 2c548c 5c88ba 26543e 6c7642 c6a442 "
    "d4762e 783e6c d896a8 a68a68 684a32 468c8c"
)
TROUSER_COLOURS = hex_colours("1c1d21 242c42 344462 4e6488 46464a 7a6e5c b0a084 d4d0c8 3c3028")


def clothing_palettes(rng: np.random.Generator, count: int, darkness: float) -> Floats:
    """Sample palettes (count, PARTS, 3) in linear light; `darkness` in [0, 1] favours dark clothes."""
    pick = rng.random((10, count), np.float32)
    tone = rng.normal(1.0, 0.16, (count, PARTS, 1)).clip(0.5, 1.5).astype(np.float32)
    tint = rng.normal(1.0, 0.07, (count, PARTS, 3)).clip(0.7, 1.3).astype(np.float32)

    def of(table: Floats, u: Floats, power: float = 1.0) -> Floats:
        row = np.minimum(u**power * len(table), len(table) - 1).astype(np.int64)
        return np.asarray(table[row], np.float32)

    palette = np.zeros((count, PARTS, 3), np.float32)
    skin, hair = of(SKIN_COLOURS, pick[0]), of(HAIR_COLOURS, pick[1], 1.7)
    top = of(CLOTH_COLOURS, pick[2], 1 + 1.4 * darkness)
    palette[:, FACE] = palette[:, SKIN] = skin * 0.85
    palette[:, HAIR] = palette[:, TRAIL] = palette[:, BEARD] = hair
    palette[:, TOP] = top
    palette[:, SLEEVE] = np.where(pick[3, :, None] < 0.85, top * 0.92, of(CLOTH_COLOURS, pick[4]))
    palette[:, BOTTOM] = of(TROUSER_COLOURS, pick[5], 1 + darkness)
    palette[:, SHOE] = of(TROUSER_COLOURS, pick[6], 1.5) * 0.8
    palette[:, BAG] = of(CLOTH_COLOURS, pick[7])
    palette[:, HAT] = palette[:, ACCENT] = of(CLOTH_COLOURS, pick[8])
    palette[:, CANOPY] = palette[:, INNER] = of(CLOTH_COLOURS, pick[9])
    palette[:, METAL] = linear(120, 122, 126)
    for same in ((FACE, SKIN), (HAIR, TRAIL), (HAIR, BEARD), (TOP, SLEEVE), (HAT, ACCENT)):
        tint[:, same[1]], tone[:, same[1]] = tint[:, same[0]], tone[:, same[0]]
    return np.asarray(np.clip(palette * tone * tint, 0.004, 0.92), np.float32)
