#!/usr/bin/env python3
"""Run another job on a Ray cluster: jobs/submit.py train --preset NAME --data URI --storage URI."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["submit", *sys.argv[1:]])
