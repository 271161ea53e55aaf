"""What a requantising run cost, for people: pure functions from rows to figures and one HTML page.

recast     a weight, its formats and its Cost; sums by layer and role, the worst, the ones apart
figures    numbers as people read them
closeness  what a fingerprint comparison says, per prompt
page       the whole page; style and hover are its CSS and its script
sections   the findings, the model's totals, the fingerprint comparison
tables     by role, by layer, the worst
heatmap    SQNR of every expert of every layer; field holds the figures, legend the colours' scale
grid       SQNR of all other weights
bars       bars, and the histogram of scale exponents; scales places and marks them
colours    what a colour means; png makes an image of them
markup     elements, everything escaped

Nothing here reads a file, knows the time or prints.
"""
