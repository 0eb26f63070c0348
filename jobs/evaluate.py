#!/usr/bin/env python3
"""Score a packaged counter: python jobs/evaluate.py --model URI --data URI --split test [--json FILE]."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["evaluate", *sys.argv[1:]])
