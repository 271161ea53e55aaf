"""Checkpoints on the Hugging Face hub, and the hashes that it publishes.

Two ways lead from an id to bytes. ``resolve`` downloads everything and gives a folder. ``opened``
fetches headers and small files only; the weights *arrive* while a conversion works on them, are
checked against the hub's hashes as they pass, and go again when they have served. huggingface-hub
takes a second to load: it is imported where a connection is made, and not before.

ids         what is an id; which files count; what the hub's errors mean
download    ``resolve``
repository  one commit: its files, sizes and hashes
connection  any range of a file, whatever breaks on the way
source      ``opened``
headers     a folder of true headers and holes
schedule    which ranges of which files must be here for which steps, as pure data
window      waits for bytes that are needed, admits what fits, frees what has served
fetch       one file or some ranges of it, checked as they pass
landing     the file on disk that bytes land in, and whose disk space can be given back
notes       what has been learnt of the hub's bytes, so that a resumed run can trust it
"""

from __future__ import annotations

from dsv4_quant.hub.download import resolve
from dsv4_quant.hub.published import published_sha256
from dsv4_quant.hub.source import Source, opened

__all__ = ["Source", "opened", "published_sha256", "resolve"]
