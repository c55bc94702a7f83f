"""Untrusted files in, safe files out."""
