"""A population of small networks, clean and backdoored, on which the verdict is measured."""
