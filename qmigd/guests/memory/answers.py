"""What the destination says to the source: the return path, read by a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable

from twisted.logger import Logger

from qmigd.errors import StreamError
from qmigd.guests.memory.channels import Channel, Lost
from qmigd.guests.memory.ram import PAGE, Ram
from qmigd.stream.return_path import PageRequest, ReturnPath, Shut

__all__ = ["Answers"]

#: Seconds that the last word of the destination may take.
_LAST_WORD = 30.0
_RECEIVE = 64 << 10

log = Logger()


class Answers:
    """The answers of one destination, if it is to give any.

    :ivar refusal: why nothing more will be said, or empty.
    """

    def __init__(
        self, on_request: Callable[[PageRequest], None], on_lost: Callable[[], None]
    ) -> None:
        """Both are called in the thread that reads.

        :param on_request: the guest waits for pages there; may raise :class:`Lost`.
        :param on_lost: nothing more will be said, and :attr:`refusal` says why.
        """
        self.refusal = ""
        self._on_request = on_request
        self._on_lost = on_lost
        self._expected = False  # there is a return path
        self._over = threading.Event()

    def listen(self, channel: Channel, ram: Ram) -> None:
        """Expect answers from here on."""
        self._expected = True
        decoder = ReturnPath({ram.name: ram.size}, PAGE)
        threading.Thread(
            target=self._listen, args=(channel, decoder), name="memory-answers", daemon=True
        ).start()

    def last(self) -> None:
        """Wait until the destination has said that it has everything, if it is to.

        :raises Lost: it did not say so in time.
        """
        if self._expected and not self._over.wait(_LAST_WORD):
            raise Lost(f"it did not say within {_LAST_WORD:g} s that it has everything")

    def release(self) -> None:
        """Wait for it no more."""
        self._over.set()

    def _listen(self, channel: Channel, decoder: ReturnPath) -> None:
        data = memoryview(bytearray(_RECEIVE))
        try:
            while count := channel.receive_some(data):
                for message in decoder.feed(bytes(data[:count])):
                    match message:
                        case Shut(error):
                            if error:
                                self._lost("the destination could not load the guest")
                            self._over.set()
                            return
                        case PageRequest():
                            self._on_request(message)
            reason = "it closed the connection"
        except (Lost, StreamError) as error:
            reason = str(error)
        except Exception:
            log.failure("return path")
            reason = "the guest's own fault"
        if not self._over.is_set():
            self._lost(reason)

    def _lost(self, reason: str) -> None:
        self.refusal = reason
        self._on_lost()
