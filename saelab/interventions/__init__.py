"""Features moved, patched, ablated and attributed in a running language model."""
