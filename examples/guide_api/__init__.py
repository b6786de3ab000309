"""The API of pgqrs' guides: no Celery worker, no broker, only Postgres."""
