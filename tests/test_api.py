"""The Python interface: what `import crowdray` offers, and the notebook that shows it."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import crowdray
from crowdray import api
from crowdray.errors import UserError
from crowdray.models.export import ExportedCounter
from crowdray.registry.packaging import package_counter

from .support.counters import exported_counter, photo

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportedCounter, str]:
    counter = exported_counter()
    folder = tmp_path_factory.mktemp("package") / "model"
    package_counter(counter, photo(1, 64, 96), folder, config={}, metrics={}, tags={})
    return counter, str(folder)


def test_import_crowdray_imports_nothing_else() -> None:
    code = "import sys, crowdray; crowdray.train; print(*sys.modules)"
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={"PYTHONPATH": str(ROOT / "platform")},
    )
    assert {"torch", "ray", "mlflow", "numpy", "rich", "tyro"} & set(result.stdout.split()) == set()
    assert {"__version__", *api.__all__} <= set(dir(crowdray))
    assert all(inspect.getdoc(getattr(crowdray, name)) for name in api.__all__)
    with pytest.raises(AttributeError, match="'contu'"):
        crowdray.contu  # noqa: B018


def test_count_of_a_path_an_image_and_an_array_agree(package: tuple[ExportedCounter, str], tmp_path: Path) -> None:
    counter, folder = package
    pixels = photo(1, 40, 56)
    array = pixels[0].permute(1, 2, 0).numpy()
    turned = Image.fromarray(np.rot90(array))  # as a camera stores it
    exif = turned.getexif()
    exif[274] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    with torch.inference_mode():
        expected = counter(pixels)[0, 0].numpy()
    loaded = crowdray.load(folder, device="cpu")
    for image in (array, Image.fromarray(array), tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        counted = crowdray.count(image, loaded)
        np.testing.assert_allclose(counted.density, expected, rtol=1e-4, atol=1e-7)
        assert float(counted) == counted.count == counted.density.sum(dtype=np.float64)
        assert (counted.interval, counted.warnings) == (None, ())  # the package has no record
    assert float(crowdray.count(array, folder)) == float(crowdray.count(array, loaded))
    with pytest.raises(UserError, match=r"float64 of shape \(40, 56, 3\); pass uint8 RGB"):
        crowdray.count(array / 255, loaded)  # type: ignore[arg-type]


def test_python_interface_notebook_runs(
    package: tuple[ExportedCounter, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def train(*arguments: Any, **options: Any) -> SimpleNamespace:
        inspect.signature(api.train).bind(*arguments, **options)
        return SimpleNamespace(model_uri=package[1])

    monkeypatch.setattr(crowdray, "train", train, raising=False)  # through Ray it takes half a minute
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    names: dict[str, Any] = {}
    cells = json.loads((ROOT / "examples" / "python_interface.ipynb").read_text())["cells"]
    for number, cell in enumerate(cell for cell in cells if cell["cell_type"] == "code"):
        exec(compile("".join(cell["source"]), f"python_interface[{number}]", "exec"), names)
    assert names["prediction"].photos == 4 and len(list((tmp_path / "counted").glob("*.overlay.png"))) == 4
    assert len(Path(names["prediction"].table).read_text().splitlines()) == 4
