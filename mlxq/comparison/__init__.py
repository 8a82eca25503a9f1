"""Models measured beside a reference, and the report of it."""
