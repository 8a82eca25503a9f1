"""A stored model, run as ``mlx_lm`` runs it: asked and timed, each time in a process of its own."""
