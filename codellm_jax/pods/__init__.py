"""TPUs that are not attached: jobs on Cloud TPU, programs compiled for a topology, memory and traffic."""
