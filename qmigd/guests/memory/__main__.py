"""``python -m qmigd.guests.memory``: one memory guest in a process of its own."""

from __future__ import annotations

import os
import signal
import sys

from twisted.internet.defer import Deferred

from qmigd.errors import QmigdError
from qmigd.guests.memory.options import parse

#: Seconds between two moments in which another thread gets its turn (Python: 0.005): a page
#: that the guest waits for is not to wait for that long.
_TURN = 0.0002


def main() -> int:
    """Run it; returns the exit code."""
    start = parse(sys.argv[1:])
    from twisted.internet import reactor

    from qmigd.guests.memory.monitor import Monitor

    sys.setswitchinterval(_TURN)
    codes: list[int] = []

    async def run() -> None:
        try:
            monitor = Monitor(reactor, start)
            await monitor.listen()
        except QmigdError as error:
            print(f"memory guest {start.name}: {error.text}", file=sys.stderr)
            codes.append(1)
        except OSError as error:
            size = f"{start.options.size >> 20} MiB of RAM"
            print(
                f"memory guest {start.name}: there is no room for its {size}: {error.strerror}",
                file=sys.stderr,
            )
            codes.append(1)
        else:
            signal.signal(signal.SIGTERM, lambda *_: monitor.machine.on_end())
            signal.signal(signal.SIGINT, lambda *_: monitor.machine.on_end())
            await monitor.ended
            await monitor.close()
            if monitor.machine.failed:
                print(f"memory guest {start.name}: {monitor.machine.failed}", file=sys.stderr)
                codes.append(1)
        reactor.stop()

    reactor.callWhenRunning(lambda: Deferred.fromCoroutine(run()))
    reactor.run()
    sys.stderr.flush()
    # Not by sys.exit(), which would wait for a thread that waits for a page.
    os._exit(codes[0] if codes else 0)


if __name__ == "__main__":
    main()
