"""Does a vector work, and at what price: accuracy, KL, entropy and probability mass against strength, with splits,
controls and intervals, on one engine.
"""
