"""Figures, feature cards and HTML reports."""
