"""``python -m dsv4_quant``: the command line."""

from dsv4_quant.cli.main import main

main()
