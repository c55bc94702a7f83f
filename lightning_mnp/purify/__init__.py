"""Which filters go: ranked, chosen, turned down, and what that costs."""
