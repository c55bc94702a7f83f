"""The paper in its own words: its equations by number, and Algorithm 1."""
