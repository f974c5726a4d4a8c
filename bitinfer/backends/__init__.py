"""Backends: each implements the four ops for the devices that it knows. ``bitinfer.dispatch`` chooses between them."""
