"""Two other programming models on this package's engine: pgqrs' (its guides) and underway's (a builder of steps)."""
