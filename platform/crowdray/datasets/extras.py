"""Optional dependencies of sources and depth teachers."""

import importlib
from typing import Any

from crowdray.errors import UserError, missing_package


def import_extra(module: str, user: str) -> Any:
    """Import a module of an optional dependency; UserError with the command that installs it.

    Args:
        user: What needs it, as the user gave it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise UserError(f"{user} cannot be used: {missing_package(error)}") from error
