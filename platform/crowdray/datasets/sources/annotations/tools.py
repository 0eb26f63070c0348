"""The annotation tools whose files are read, recognised by content, so that a message can name the right source."""

import codecs
import re

from crowdray import storage

READ_BYTES = 65_536
"""Length of a file's start that is searched."""

TOOLS = (
    ("via", "the VGG Image Annotator (VIA)", r'"_via_img_metadata"|region_shape_attributes|"shape_attributes"'),
    ("supervisely", "Supervisely", r'"geometryType"|"classTitle"'),
    ("labelme", "LabelMe", r'"shape_type"|"imagePath"'),
    ("label-studio", "Label Studio", r'"?"original_width"|"annotations"\s*:\s*\[\s*\{[^{}]*"result"|annotation_id'),
    ("cclabeler", "cclabeler or in the style of NWPU-Crowd", r'"human_num"|"img_id"'),
    ("coco", "a tool that exports COCO", r'"categories"\s*:|"image_id"\s*:'),
    ("voc", "a tool that exports Pascal VOC", r"<annotation>"),
    ("cvat", "CVAT", r"<annotations>"),
    ("yolo", "a tool that exports YOLO boxes", r"\A\s*\d+([ \t]+[\d.eE+-]+){4}[ \t]*(\r|\n|\Z)"),
    ("text", "hand, as points in a text file", r"\A\s*-?[\d.]+[ \t]+-?[\d.]+[ \t]*(\r|\n|\Z)"),
    ("csv", "a spreadsheet", r"(?i)\A(sep=.\s+)?(?=[^\r\n]*\b(image|file|path)[^\r\n]*)[^\r\n]*\b(x|x1|xmin)\b"),
)
"""Source, author and pattern of each kind of file; the first pattern that occurs decides."""


def recognise(uri: str) -> tuple[str, str]:
    """Return the source that reads a file and who wrote it; empty strings if unknown."""
    with storage.open_read(uri) as file:
        start = file.read(READ_BYTES)
    utf_16 = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    text = start.decode("utf-16" if utf_16 else "utf-8-sig", errors="replace")
    return next(((source, author) for source, author, pattern in TOOLS if re.search(pattern, text)), ("", ""))
