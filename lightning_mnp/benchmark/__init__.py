"""The comparison of defenses: cells, their results, and the report made of these."""
