"""People's own data: a folder of images, annotated in one of the formats that annotation tools write."""

from crowdray.data.sources.own.coco import Coco
from crowdray.data.sources.own.csv_table import CsvTable
from crowdray.data.sources.own.cvat import Cvat
from crowdray.data.sources.own.folder import AnnotatedFolder
from crowdray.data.sources.own.label_studio import LabelStudio
from crowdray.data.sources.own.labelme import LabelMe

FORMATS: dict[str, type[AnnotatedFolder]] = {
    source.kind: source for source in (CsvTable, Coco, LabelStudio, Cvat, LabelMe)
}
"""The formats by their names on the command line."""
