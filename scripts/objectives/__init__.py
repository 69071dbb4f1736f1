"""Measurements of loss terms, one module for each family."""
