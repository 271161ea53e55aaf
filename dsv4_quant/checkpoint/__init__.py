"""What is on disk.

header      the strict safetensors header parser, and its exact inverse
folder      names, index, headers: what a folder holds, and all that is wrong with it
placement   how a stored tensor is cut into the pieces of N ranks
matching    headers against the catalogue
reader      Checkpoint: whole logical tensors, by ranges, from either layout
digest      the value digest: a hash of decoded values
manifest    dsv4-manifest.json and SHA256SUMS
"""

from dsv4_quant.checkpoint.reader import Checkpoint

__all__ = ["Checkpoint"]
