"""Calibration: a threshold for the verdict, from clean networks of the user's own."""
