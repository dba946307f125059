"""A Cancel takes effect inside a layer, not only between layers."""

import pytest
import torch


def test_the_next_torch_call_stops(host):
    import comfy.model_management as management

    from svdq_core.host.interrupt import Interruptible

    calls = []

    def layer():
        value = torch.ones(4)
        for step in range(10):
            calls.append(step)
            if step == 3:
                management.interrupt_current_processing()
            value = value * 2
        return value

    with pytest.raises(management.InterruptProcessingException), Interruptible():
        layer()
    assert calls == [0, 1, 2, 3]
    with Interruptible():  # the request is answered, work goes on
        assert float(torch.ones(4).sum()) == 4
