#!/usr/bin/env python3
"""Promote the candidate of a model to champion: python jobs/promote.py --model NAME --data URI."""

import sys
from pathlib import Path

sys.path.insert(1, str(Path(__file__).resolve().parents[1] / "platform"))

from crowdray.console.main import main

if __name__ == "__main__":
    main(["promote", *sys.argv[1:]])
