"""The train step, the loop around it, the plan of a run, and `t5x cache`, which tokenizes its rows beforehand."""
