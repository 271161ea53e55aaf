"""The reference forward pass of DeepSeek-V4, a layer at a time. Read it in this order:

embeddings   head        token ids to vectors; at the end, streams to logits
             streams     the residual stream is several streams (mHC): how sub-layers read and write
a layer      block       attention, then experts
             attention   window, compressed entries, low-rank output by groups
             rope        rotary positions, YaRN
             compressor  r tokens become one entry (CSA, HCA)
             indexer     which entries a position attends to
             attend      the softmax over all of them
             moe         hash-routed and scored experts
the rest     mtp         one more layer that guesses a token further
             forward     all of it, for several prompts
numbers      arithmetic  exact or deployed: what is rounded where
             functions   softmax, norms and the like
             dot         the order of every sum
             linear      products with stored weights on several threads
             panels      decoding a weight a few rows at a time
             on_device   the same products on a GPU, watched
machinery    batch       several prompts, prefill and decode
             weights     reading a layer's tensors in time
             reading     bytes read against bytes needed, and who waited for whom
             observer    watching a pass

A GPU, where there is one, computes the products of ``linear``, and nothing else: they keep the
order of every sum in ``dot`` there, too (float32 with fused multiply-adds, no tensor cores), while
PyTorch's ``exp`` and ``rsqrt`` would round otherwise. So a pass with a GPU gives the bits of one
without, and for fingerprints it is no other class of machine. Weights travel in their stored form.
It has not run on a GPU yet: shown in PyTorch on CPUs and in Triton's interpreter, and compiled for
one.

Equal weights give bit-equal logits in ``exact``, whatever the format, layout, GPU count, number of
threads, number of prompts at once, whether positions are prefilled or decoded, and what multiplies.
"""

from dsv4_quant.model.forward import Result, forward
from dsv4_quant.model.observer import Observer
from dsv4_quant.model.reading import Reading

__all__ = ["Observer", "Reading", "Result", "forward"]
