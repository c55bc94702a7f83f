"""Touching a network, and leaving it as it was."""
