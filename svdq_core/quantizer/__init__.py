"""From 16-bit weights to 4-bit files: calibration, smoothing, low rank, rounding, the pipeline.

Data flows one way: statistics -> smoothing -> moments -> lowrank -> rounding, put together per layer by
``recipes`` and over a whole checkpoint by ``pipeline``.
"""
