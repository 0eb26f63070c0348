"""The command line: arguments, progress and tables."""
