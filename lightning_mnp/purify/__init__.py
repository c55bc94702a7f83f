"""Which filters go or are turned down, how weights are tuned after that, and what it costs."""
