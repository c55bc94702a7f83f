"""What the doors share under Lightning, and the processes of a run."""
