"""underway's model: typed steps in a row, with activities for their side effects."""
