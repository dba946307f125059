"""Reading and writing checkpoints: one module per file convention, over a checked safetensors layer."""
