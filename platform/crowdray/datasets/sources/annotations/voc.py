"""Pascal VOC's XML boxes: one file per image, in any folder or next to it.

Corners are continuous pixels, as labelImg and CVAT write them; the files of the VOC challenges count from 1
(host.robots.ox.ac.uk/pascal/VOC), half a pixel that does not matter here. A file without objects is an empty scene.
"""

from xml.etree.ElementTree import Element

from crowdray.datasets.sources.annotations.annotation import ImageAnnotation, known_size, parse_number
from crowdray.datasets.sources.annotations.base import AnnotatedFolder
from crowdray.datasets.sources.annotations.shapes import box
from crowdray.datasets.sources.annotations.xml_reader import read_elements

EXPORT = "export it as Pascal VOC again"


class Voc(AnnotatedFolder):
    """Boxes of objects; an image is found by the name of its file, else by its element `filename`."""

    endings = (".xml",)
    per_image = True

    def _read(self, uri: str) -> list[ImageAnnotation]:
        image = self._annotation_named_after(uri)
        with image.capture_error():
            for number, element in enumerate(read_elements(uri, "annotation", EXPORT)):
                if element.tag == "filename":
                    image.alias = (element.text or "").strip()
                elif element.tag == "size":
                    width, height = (_number(element, side, f"{uri}: size", "0") for side in ("width", "height"))
                    image.size = known_size(height, width)
                elif element.tag == "object":
                    self._add(image, element, f"{uri}: element {number}, object")
        return [image]

    def _add(self, image: ImageAnnotation, element: Element, where: str) -> None:
        label, bounds = (element.findtext("name") or "").strip(), element.find("bndbox")
        if bounds is None:
            image.add_shape(self._rules, "shape without bndbox", label, [], where)
            return
        left, top, right, bottom = (_number(bounds, side, where) for side in ("xmin", "ymin", "xmax", "ymax"))
        image.add_shape(self._rules, "box", label, box(left, top, right - left, bottom - top), where)


def _number(element: Element, side: str, where: str, default: str = "") -> float:
    return parse_number((element.findtext(side) or default).strip(), f"{where}: {side}")
