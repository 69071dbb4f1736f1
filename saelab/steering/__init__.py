"""Steering with SAE features and directions, its effect and cost, attribution, patching and concept erasure."""
