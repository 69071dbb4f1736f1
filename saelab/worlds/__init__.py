"""Worlds whose concepts are known token by token."""
