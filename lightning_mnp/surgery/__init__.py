"""Work on a network: find its filters, mask and prune them, leave the rest as it was."""
