"""The train step, the loop around it, what a run will be, and its rows made before it by many processes."""
