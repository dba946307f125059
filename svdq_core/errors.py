"""The errors a user can meet. Each message names the file or layer and says what to do."""


class SVDQuantError(Exception):
    """Base of every error this package raises on bad input."""


class CheckpointError(SVDQuantError):
    """A file that cannot be read, is not what it claims to be, or cannot be written."""


class LayerError(SVDQuantError):
    """A layer that cannot be quantized or run as asked."""
