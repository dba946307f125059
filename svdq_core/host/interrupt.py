"""How a user stops long work."""

import comfy.model_management
from torch.overrides import TorchFunctionMode


class Interruptible(TorchFunctionMode):
    """Inside, a user's Cancel takes effect at the next call of torch instead of at the next layer or step."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        comfy.model_management.throw_exception_if_processing_interrupted()
        return func(*args, **(kwargs or {}))
