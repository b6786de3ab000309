"""Celery's own integration suite, run against this package; see ``__main__``."""
