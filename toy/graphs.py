"""CUDA graphs: what a function asks of the GPU, recorded once and replayed.

The toy's networks are so small that a GPU computes a step faster than Python can launch its
kernels.
"""

import torch

WARM_UP = 3  # calls before the recording, in which libraries choose their algorithms


def recorded(device, generators=(), modules=()):
    """Decorator for a function of tensors of fixed shapes, whose results it overwrites at each
    call. Without CUDA the function stays what it is.

    The function may not wait for the GPU, and draws from `generators` alone. It may change buffers
    of `modules`. Arguments that are not tensors stay those of the first call; they may hold the
    results of another recorded function, whose every call overwrites them in place.
    """
    if device.type != "cuda":
        return lambda function: function
    return lambda function: Recorded(function, generators, modules)


class Recorded:
    """See recorded."""

    def __init__(self, function, generators, modules):
        self.function, self.generators, self.graph = function, generators, None
        self.buffers = [b for module in modules for b in module.buffers()]

    def __call__(self, *arguments):
        if self.graph is None:
            self._record(arguments)
        for mine, given in zip(self.arguments, arguments, strict=True):
            if torch.is_tensor(mine):
                mine.copy_(given)
        self.graph.replay()
        return self.results

    def _record(self, arguments):
        self.arguments = [x.clone() if torch.is_tensor(x) else x for x in arguments]
        states = [g.get_state() for g in self.generators]
        buffers = [b.clone() for b in self.buffers]
        stream = torch.cuda.Stream()  # not the default one, which autograd would bind to
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                self.function(*self.arguments)
        torch.cuda.current_stream().wait_stream(stream)
        for buffer, value in zip(self.buffers, buffers, strict=True):  # as before the warm-up
            buffer.copy_(value)
        self.graph = torch.cuda.CUDAGraph()
        for generator, state in zip(self.generators, states, strict=True):
            generator.set_state(state)
            self.graph.register_generator_state(generator)
        with torch.cuda.graph(self.graph):
            self.results = self.function(*self.arguments)
