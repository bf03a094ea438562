"""What a launch did."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Counters:
    """Dynamic counts of one launch, summed over its threads.

    The fields up to ``switches`` mirror msl::Counters (include/msl/executor.h), in order.  Loads
    and stores are counted in check mode only, and as the optimised code makes them: requested
    bytes, without any cache.
    """

    #: 8x8x8 matrix products (one for all 32 lanes of a simdgroup)
    mma: int
    #: of these, with two half operands (mixed ones are multiplied as float)
    mma_half: int
    #: of these, with two bfloat operands
    mma_bfloat: int
    #: shuffles and reductions, one for each lane
    simd_ops: int
    #: simdgroup_barrier calls, one for each lane
    simd_barriers: int
    #: threadgroup_barrier calls, one for each thread
    threadgroup_barriers: int
    #: shuffles and reductions of a part of a simdgroup, because the rest took another branch
    divergent_simd_ops: int
    #: exp, exp2, exp10 and tanh
    exps: int
    #: log and log2
    logs: int
    device_bytes_read: int
    device_bytes_written: int
    threadgroup_bytes_read: int
    threadgroup_bytes_written: int
    #: bytes read from constant buffers
    constant_bytes_read: int
    #: load instructions on device memory
    device_reads: int
    device_writes: int
    threadgroup_reads: int
    threadgroup_writes: int
    threads: int
    threadgroups: int
    #: fiber switches: what the simulation itself paid for the collectives
    switches: int
    #: largest threadgroup memory of a threadgroup in bytes, static and dynamic
    threadgroup_memory: int

    @property
    def mma_float(self) -> int:
        """8x8x8 products with a float operand, or with operands of two types."""
        return self.mma - self.mma_half - self.mma_bfloat
