"""The annotation tools whose files are read, recognised by content, so that a message can name the right source."""

import codecs
import re

from crowdray import storage

READ_BYTES = 65_536
"""Length of a file's start that is searched."""

FINGERPRINTS = (
    (
        "via",
        "an export of the VGG Image Annotator (VIA)",
        r'"_via_img_metadata"|(region_|")shape_attributes',
    ),
    ("supervisely", "an annotation of Supervisely", r'"geometryType"|"classTitle"'),
    ("labelme", "an annotation of LabelMe", r'"shape_type"|"imagePath"'),
    (
        "label-studio",
        "an export of Label Studio",
        r'"original_width"|"result"\s*:\s*\[|annotation_id',
    ),
    ("cclabeler", "an annotation of cclabeler or in the style of NWPU-Crowd", r'"human_num"|"img_id"'),
    ("coco", "COCO JSON", r'"(categories|image_id|file_name)"\s*:'),
    ("voc", "Pascal VOC XML", r"<annotation>"),
    ("cvat", "an export of CVAT", r"<annotations>"),
    ("yolo", "YOLO boxes", r"\A\s*\d+([ \t]+[\d.eE+-]+){4}[ \t]*(\r|\n|\Z)"),
    ("text", "points in a text file", r"\A\s*-?[\d.]+[ \t]+-?[\d.]+[ \t]*(\r|\n|\Z)"),
    ("csv", "a table of heads", r"(?i)\A(sep=.\s+)?(?=[^\r\n]*\b(image|file|path)[^\r\n]*)[^\r\n]*\b(x|x1|xmin)\b"),
)
"""Source, description and pattern of each kind of file; the first pattern that occurs decides."""


def recognise(uri: str) -> tuple[str, str]:
    """Return the source that reads a file and what the file looks like; empty strings if unknown."""
    with storage.open_read(uri) as file:
        start = file.read(READ_BYTES)
    utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = start.decode("utf-16" if utf_16 else "utf-8-sig", errors="replace")
    return next(((source, kind) for source, kind, pattern in FINGERPRINTS if re.search(pattern, text)), ("", ""))
