"""Bodies of the small commands of `steer-engine`; `serve` and `derive` live with what they start."""
