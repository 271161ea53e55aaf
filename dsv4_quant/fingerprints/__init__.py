"""What the reference forward pass says of a checkpoint on fixed prompts, in a few kB.

prompts   tokens that exercise every boundary and every expert of the hash layers
script    what is run and where it is looked at
sketch    a hash, a norm and a few sums for a large array
tables    weights that a pass may use without showing them
watcher   condenses the streams of every layer while they are there
coverage  what the prompts exercised, and what not
machine   where bits come from: equal machines give equal bits
record    script in, fingerprint out
document  the fingerprint as an object; file and parse write and read it, node checks JSON
served    what a served model said, as a fingerprint
gates     bit, numeric, lossy: what each demands, and which one applies
compare   a recorded fingerprint against a fresh one
suspects  from the first streams that differ to the tensors to look at
make      the whole way from a folder to a fingerprint; ``validators.forward`` is the way back
"""
