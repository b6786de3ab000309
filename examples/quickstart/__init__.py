"""An order in three durable steps."""
