"""The GPU library (csrc/gpu): there only if hvd_backup was built where CUDA's nvcc is.

pack, unpack and sum are one launch (of up to 512 gradients, 1024 sources) on a stream of the caller, and return before
it has run. Every address must be one that the GPU can use, and stay valid until the stream has come past it. dtypes are
float16, bfloat16, float32 and float64. `device` is the number of the GPU, `stream` a cudaStream_t as an integer. Errors
are RuntimeError, with what CUDA said.
"""

from collections.abc import Sequence

class HostMemory:
    """Page-locked: the GPU reads and writes it by itself. Given back when this is collected."""

    @property
    def address(self) -> int: ...

class Device:
    """A GPU for the core, which uses it with a stream of its own, and with NCCL where that can be loaded.

    It must live until the core does not use its address any more.
    """

    def __init__(self, device: int, nccl: str = "") -> None:
        """nccl: a file to load NCCL from where there is none under its usual name (that of PyTorch, once imported)."""
    @property
    def address(self) -> int: ...
    @property
    def why_no_groups(self) -> str:
        """Why NCCL cannot be used; empty: it can."""
    @property
    def nccl_version(self) -> str:
        """Such as "2.32.3"; empty if none was found. It may be too old."""

    def host_memory(self, bytes: int) -> HostMemory:
        """At least one byte, with whatever lies in it."""

def try_on(device: int) -> None:
    """Runs a kernel on a GPU, and waits for it; raises RuntimeError if that is impossible."""

def can_cast(gradient: str, wire: str) -> bool:
    """Whether pack and unpack take these two dtypes.

    Equal ones; float32 and float16 or bfloat16, float64 and float16 or float32.
    """

def pack(
    gradient: str,
    wire: str,
    gradients: Sequence[int],
    begins: Sequence[int],
    counts: Sequence[int],
    bucket: int,
    scale: float,
    device: int,
    stream: int,
    tally: int = 0,
) -> None:
    """Gradients into their bucket: bucket[begins[i] + e] = scale * gradients[i][e], cast.

    Args:
        gradient, wire: dtypes of the gradients and of the bucket.
        gradients: their addresses, elements in the order of memory; 0: zeros. One may lie in its place in the bucket.
        begins, counts: elements of the bucket; ascending, without overlap. What lies between them stays as it is.
        tally: address of 16 bytes on the GPU, or 0: takes the squared norm of what has been written (float64), and
            whether it holds a NaN or an infinity (uint32, 0 or 1).
    """

def unpack(
    gradient: str,
    wire: str,
    gradients: Sequence[int],
    begins: Sequence[int],
    counts: Sequence[int],
    bucket: int,
    scale: float,
    device: int,
    stream: int,
) -> None:
    """A bucket into its gradients: gradients[i][e] = scale * bucket[begins[i] + e], cast. See pack; 0: none."""

def sum(
    dtype: str,
    destination: int,
    sources: Sequence[int],
    weights: Sequence[float],
    scale: float,
    count: int,
    device: int,
    stream: int,
    norms: int = 0,
) -> None:
    """destination[e] = scale * sum_i weights[i] * sources[i][e], in that order: the bits that the CPU's kernel gives.

    float16, bfloat16 and float32 are summed in float32. The destination may be one of the sources.

    Args:
        norms: address of 16 bytes on the GPU, or 0: takes two squared norms (float64), that of all sources together,
            before weights, and that of the destination.
    """
