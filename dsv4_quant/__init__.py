"""Convert, requantise, prove, repack and verify DeepSeek-V4 checkpoints."""

__version__ = "0.1.0"
