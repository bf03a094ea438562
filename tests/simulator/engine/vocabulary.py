"""Names of Metal's built-in types and attributes."""

SCALARS = frozenset(
    "char uchar short ushort int uint long ulong half bfloat float bool "
    "int8_t uint8_t int16_t uint16_t int32_t uint32_t int64_t uint64_t size_t".split()
)
VECTORS = frozenset(
    prefix + scalar + size
    for scalar in "char uchar short ushort int uint long ulong half bfloat float bool".split()
    for prefix in ("", "packed_")
    for size in "234"
)
# Attributes of kernel parameters that stand for a value (include/msl/arguments.h).
KERNEL_ATTRIBUTES = frozenset(
    """
    thread_position_in_grid thread_position_in_threadgroup threadgroup_position_in_grid
    threads_per_threadgroup threadgroups_per_grid threads_per_grid dispatch_threads_per_threadgroup
    thread_index_in_threadgroup thread_index_in_simdgroup thread_index_in_quadgroup
    simdgroup_index_in_threadgroup quadgroup_index_in_threadgroup threads_per_simdgroup
    thread_execution_width simdgroups_per_threadgroup quadgroups_per_threadgroup
    dispatch_simdgroups_per_threadgroup
    """.split()
)
