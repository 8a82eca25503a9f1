"""From a plan to a folder that loads."""
