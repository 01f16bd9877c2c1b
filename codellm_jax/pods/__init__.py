"""TPUs that are not there yet: jobs on Cloud TPU, programs compiled for a topology, memory and traffic."""
