"""A step that is killed, and a step that fails."""
