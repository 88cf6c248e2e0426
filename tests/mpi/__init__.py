"""Jobs of several processes, started by mpirun."""
