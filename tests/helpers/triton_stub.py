"""A driver for Triton that compiles for sm_90 as on a GPU and records launches, so that both launch paths run."""

from typing import ClassVar

from triton.backends.compiler import GPUTarget

CPU = -1  # the device index of CPU tensors


class Launcher:
    """Replacement of the launcher of a compiled kernel; records its arguments."""

    calls: ClassVar[list] = []

    def __init__(self, source, metadata):
        self.source = source

    def __call__(self, *arguments):
        Launcher.calls.append((self.source, arguments))


class Utils:
    def load_binary(self, name, kernel, shared, device):
        return object(), hash(kernel), 10, 0, 1024

    def unload_module(self, module):
        pass

    def get_device_properties(self, device):
        return {"max_shared_mem": 232448, "multiprocessor_count": 132}


class Driver:
    """The part of a driver's interface that Triton uses."""

    launcher_cls, utils, stream = Launcher, Utils(), 7

    def get_current_device(self):
        return CPU

    def get_current_stream(self, device):
        return self.stream

    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

    def get_benchmarker(self):
        def measure(call, quantiles=None):
            call()
            return [1.0, 1.0, 1.0]

        return measure
