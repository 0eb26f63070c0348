#!/usr/bin/env python3
"""Convert a dataset: python jobs/convert.py SOURCE --source PATH|URI --dest URI; or check it with --check."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
