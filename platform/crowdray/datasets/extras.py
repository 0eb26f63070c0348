"""Optional dependencies of sources and depth teachers."""

import importlib
from typing import Any

from crowdray.errors import UserError


def import_extra(module: str, extra: str) -> Any:
    """Import a module of an optional dependency; UserError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{module} is not installed: pip install 'crowdray[{extra}]'") from error
