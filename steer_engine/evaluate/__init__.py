"""Measures the effect and the side effects of a vector on one engine: accuracy, KL, entropy and probability mass
against strength, with separate splits, controls and confidence intervals.
"""
