"""Checkpoint files: untrusted ones are read safely, new ones are written whole or not at all."""
