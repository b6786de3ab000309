"""Measurements: ``python -m benchmarks.NAME``; every one compares sides in one run, on one machine, in turns."""
