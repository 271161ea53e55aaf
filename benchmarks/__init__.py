"""Measurements that anyone can repeat: ``python -m benchmarks`` (or ``make bench``).

conversion  convert, verify and digest against ``cp`` and against a plain PyTorch converter
casts       the CPU casts against plain PyTorch, GB/s
kernels     the Triton kernels on a GPU against its copy bandwidth
"""
