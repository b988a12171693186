"""What fastlora gives on the machine at hand: ``python -m bench --help``.

Two rules. Nothing is reported that was not measured in that run. Nothing is timed whose parity is red.
"""
