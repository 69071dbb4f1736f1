"""Synthetic text and models whose concepts are known token by token."""
