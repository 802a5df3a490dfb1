"""What qmigd costs, in numbers; docs/benchmarks says how to read them.

===============  ==============================================================
``__main__``     runs all parts or some, and writes the one table
``table``        a row, its medians and ratios, and the table
``qmp``          a QMP client that keeps the time of each event
``moves``        one guest, moved on and on, by qmigd or by QEMU alone
``negotiation``  what the negotiation adds to a move
``streams``      how fast RAM moves, and what that costs
``tls_streams``  the same in TLS: through the relay, and by QEMU's own TLS
``course``       a source, two relays and a sink, and what they take
``ends``         the source and the sink
``ours``         qmigd's relays, or qmigd that hands over, on the course
``sides``        its two sides there
``relay``        qmigd's relay, socat and haproxy in the same place
``movers``       qmigd's relay with each of its movers
``tls``          qmigd's relay, haproxy and ssh in the same place, encrypting
``ssh``          the ssh tunnel
``ktls``         kernel TLS, under emulation
``handshakes``   handshakes per second, and the memory of those that wait
===============  ==============================================================
"""
