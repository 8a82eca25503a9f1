"""A budget spent, and checked."""
