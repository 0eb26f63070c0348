#!/usr/bin/env python3
"""Count the people in photos: python jobs/predict.py --model URI --input PATH|URI --output URI."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["predict", *sys.argv[1:]])
