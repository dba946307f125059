"""Number formats: quantize, pack, unpack, dequantize. The reference all kernels are held to."""
