"""The write side of the ledger: one module per noun, functions that take the session first, no Celery."""
