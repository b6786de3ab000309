"""What the benchmarks share: sides to compare, their workers, and how they are measured."""
