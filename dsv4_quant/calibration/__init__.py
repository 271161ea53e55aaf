"""What every expert sees when a model reads prompts, so that its weights can be rounded for that.

collect  one forward pass, which leaves every expert's inputs in a folder
inputs   the folder as a conversion uses it: a weight's name, and out comes what rounding needs

The rounding itself is ``kernels.second_order_numba``. A conversion knows neither the model nor
this package: it is handed an object with a method ``factor(name)``.
"""

from dsv4_quant.calibration.collect import collect
from dsv4_quant.calibration.inputs import Calibration

__all__ = ["Calibration", "collect"]
