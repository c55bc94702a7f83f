"""Experiments behind the figures in the documentation; too heavy for the tests."""
