"""The clean images: read, batched, augmented, chosen."""
