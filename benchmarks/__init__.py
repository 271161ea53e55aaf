"""Measurements that anyone can repeat: ``python -m benchmarks`` (or ``make bench``).

planning    inspect, verify's first level, plan and manifest for V4-Pro's 145,116 tensors
conversion  convert, verify and digest against ``cp``, ``sha256sum`` and plain PyTorch
scaling     time and memory against size and threads, the plot, and ``--max-memory``
casts       the CPU casts against plain PyTorch, GB/s
kernels     the Triton kernels on a GPU against its copy bandwidth
"""
