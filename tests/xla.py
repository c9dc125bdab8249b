"""XLA's flags in the tests: devices on one CPU, and programs that are compiled quickly rather than run quickly."""

# Kernels by LLVM alone and in one piece: a third of the time, beside JAX_DISABLE_MOST_OPTIMIZATIONS.
QUICK = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def flags(devices):
    """XLA_FLAGS for so many devices."""
    return f"--xla_force_host_platform_device_count={devices} {QUICK}"
