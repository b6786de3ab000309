"""Workers are killed, and their work goes on: ``python -m examples.demo``."""
