"""The defense set: clean images, read from the user's data and checked."""
