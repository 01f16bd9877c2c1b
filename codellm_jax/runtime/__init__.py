"""Training infrastructure: meshes and shardings, optimization, state, checkpoints, records."""
