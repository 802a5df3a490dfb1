"""What qmigd costs, in numbers; docs/benchmarks says how to read them.

===============  ==============================================================
``__main__``     runs all parts or some, and writes the one table
``table``        a row, its medians and ratios, and the table
``qmp``          a QMP client that keeps the time of each event
``moves``        one guest, moved on and on, by qmigd or by QEMU alone
``negotiation``  what the negotiation adds to a move
``streams``      how fast RAM moves, and what that costs
``relay``        qmigd's relay, socat and haproxy in the same place
``handshakes``   handshakes per second, and the memory of those that wait
===============  ==============================================================
"""
