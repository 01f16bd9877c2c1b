"""How it is trained: meshes and shardings, optimization, state, checkpoints, records."""
