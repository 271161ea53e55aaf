"""What a requantising run cost, for people: pure functions from rows to figures and one HTML page.

requantised  a weight, its formats and its Cost; sums by layer and role, the worst, the ones apart
figures      numbers as people read them
closeness    what a fingerprint comparison says, per prompt
page         the whole page; style and hover are its CSS and its script
sections     what comes before the heat map and after it
heatmap      SQNR of every expert of every layer
grid         the same of the dense weights
bars         bars, and the histogram of scale exponents
colours      what a colour means; png, an image of them
markup       elements, everything escaped

Nothing here reads a file, knows the time or prints.
"""
