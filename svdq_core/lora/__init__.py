"""Adapters of any kind as extra rank on a quantized layer."""
