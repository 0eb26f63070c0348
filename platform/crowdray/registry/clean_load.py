"""Check that a packaged counter works where MLflow and torch are, and nothing of crowdray."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from crowdray import storage
from crowdray.registry.loading import DESCRIPTION, GRAPH
from crowdray.registry.packaging import same_density
from crowdray.registry.program import checked_archive

_TIMEOUT_S = 300.0
_SCRIPT = """
import sys
sys.modules["crowdray"] = None  # importing it fails, even where it is installed
import mlflow.pytorch, numpy, torch
folder, image, density = sys.argv[1:]
counter = mlflow.pytorch.load_model(folder)
with torch.no_grad():
    result = counter(torch.from_numpy(numpy.load(image)))
numpy.save(density, result.numpy(), allow_pickle=False)
"""


def clean_load_problem(package: Path, image: Tensor, expected: Tensor) -> str:
    """Load the program of a package in a new interpreter without crowdray, and count an image with it.

    MLflow follows what a package says, and could run code from it. It therefore gets the parts that `load_counter`
    checks and uses, and no others.

    Args:
        package: Local folder of a package that `load_counter` accepted.
        image: uint8 RGB (1, 3, H, W).
        expected: Its density.

    Returns:
        What is wrong; empty if it returns the density.
    """
    with storage.scratch_folder("clean-load") as scratch:
        (scratch / GRAPH).parent.mkdir()
        (scratch / GRAPH).write_bytes(checked_archive(package / GRAPH).getbuffer())
        flavor = {"model_data": Path(GRAPH).parent.name, "pytorch_version": torch.__version__}
        (scratch / DESCRIPTION).write_text(json.dumps({"flavors": {"pytorch": flavor}}))  # JSON is YAML
        given, result = scratch / "image.npy", scratch / "density.npy"
        np.save(given, image.contiguous().numpy(), allow_pickle=False)
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "MLFLOW"))}
        variables |= {"MLFLOW_ALLOW_PICKLE_DESERIALIZATION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
        command = [sys.executable, "-I", "-c", _SCRIPT, str(scratch), str(given), str(result)]
        try:
            done = subprocess.run(
                command, cwd=scratch, env=variables, capture_output=True, text=True, timeout=_TIMEOUT_S
            )
        except subprocess.TimeoutExpired:
            return f"it takes more than {_TIMEOUT_S:.0f} s"
        if done.returncode != 0:
            return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        density = torch.from_numpy(np.load(result, allow_pickle=False))
    return "" if same_density(density, expected) else "its density differs there"
