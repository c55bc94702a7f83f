"""What speaks for a backdoor: one module a signal, and the verdict."""
