"""Figures, feature cards and HTML pages; all plotting with plotly happens here."""
