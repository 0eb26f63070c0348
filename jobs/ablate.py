#!/usr/bin/env python3
"""Compare what the auxiliary tasks contribute, over seeds: python jobs/ablate.py --preset NAME --data URI."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["ablate", *sys.argv[1:]])
