"""For tests of kernels that start while the one in front of them ends."""

from collections.abc import Callable

import torch


def assert_waits_for(
    linear: Callable[..., torch.Tensor],
    operands: dict,
    written: str,
    values: list[torch.Tensor],
    expected: list[torch.Tensor],
    rounds: int,
    in_graph: bool,
) -> None:
    """An operand is written in place by the kernel in front; the one before that is a layer that has just read it.

    Args:
        written: the operand.
        values, expected: what is written in turn, and the outputs that belong to them.
    """
    kept = operands[written].view(torch.uint8)
    source = torch.empty_like(kept)

    def write_and_multiply() -> torch.Tensor:
        torch.bitwise_or(source, 0, out=kept)  # a kernel; copy_ would be a copy, which nothing overtakes
        return linear(**operands)

    source.copy_(values[0].view(torch.uint8))
    captured = write_and_multiply()
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = write_and_multiply()
    seen = []
    for index in range(rounds):
        source.copy_(values[index % len(values)].view(torch.uint8))
        linear(**operands)
        if in_graph:
            graph.replay()
        seen.append(captured.clone() if in_graph else write_and_multiply())
    torch.cuda.synchronize()
    assert all(torch.equal(y, expected[index % len(values)]) for index, y in enumerate(seen))
