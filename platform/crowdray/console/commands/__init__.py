"""One module per command: its arguments as a dataclass, and main(arguments)."""
