"""Names of Metal's built-in types and attributes."""

_INTEGERS = ["char", "uchar", "short", "ushort", "int", "uint", "long", "ulong"]
_VECTOR_ELEMENTS = [*_INTEGERS, "half", "bfloat", "float", "bool"]
_SIZED_INTEGERS = [f"{sign}int{bits}_t" for sign in ("", "u") for bits in (8, 16, 32, 64)]

SCALARS = frozenset([*_VECTOR_ELEMENTS, *_SIZED_INTEGERS, "size_t"])
VECTORS = frozenset(
    f"{prefix}{element}{size}"
    for prefix in ("", "packed_")
    for element in _VECTOR_ELEMENTS
    for size in (2, 3, 4)
)

# Attributes of kernel parameters that stand for a value (include/msl/arguments.h).
KERNEL_ATTRIBUTES = frozenset(
    [
        "thread_position_in_grid",
        "thread_position_in_threadgroup",
        "threadgroup_position_in_grid",
        "threads_per_threadgroup",
        "threadgroups_per_grid",
        "threads_per_grid",
        "dispatch_threads_per_threadgroup",
        "thread_index_in_threadgroup",
        "thread_index_in_simdgroup",
        "thread_index_in_quadgroup",
        "simdgroup_index_in_threadgroup",
        "quadgroup_index_in_threadgroup",
        "threads_per_simdgroup",
        "thread_execution_width",
        "simdgroups_per_threadgroup",
        "quadgroups_per_threadgroup",
        "dispatch_simdgroups_per_threadgroup",
    ]
)
