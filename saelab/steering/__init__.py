"""Steering measured: effect and cost over strengths, against baselines."""
