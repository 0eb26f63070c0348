"""Command line: arguments, progress, tables and the `crowdray` command."""
