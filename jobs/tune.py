#!/usr/bin/env python3
"""Search loss weights and stage lengths: python jobs/tune.py --preset NAME --data URI --trials N."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["tune", *sys.argv[1:]])
