#!/usr/bin/env python3
"""Train a counter and register it: python jobs/train.py --preset NAME --data URI."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["train", *sys.argv[1:]])
