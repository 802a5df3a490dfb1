"""Kernel TLS as far as it can be seen without a kernel that has it: keys, numbers, wiping."""

from __future__ import annotations

import errno
import socket
import struct
from typing import cast

from cryptography.hazmat.primitives.ciphers.aead import AESGCM, ChaCha20Poly1305
from hypothesis import given
from hypothesis import strategies as st
from twisted.trial.unittest import SynchronousTestCase

from qmigd.channels.kernel_tls import CIPHERS, KernelTls, TrafficKeys, install, probe
from qmigd.errors import LocalError
from qmigd.transports.sockets import tcp_pair
from tests.rig.tls_records import sessions

# RFC 8448, section 3: the secrets, what they lead to, and the last record each way.
_CLIENT_SECRET = "9e40646ce79a7f9dc05af8889bce6552875afa0b06df0087f792ebb7c17504a5"
_CLIENT_KEY = "17422dda596ed5d9acd890e3c63f5051"
_CLIENT_IV = "5b78923dee08579033e523d9"
_CLIENT_RECORD = """
    17030300 43a23f70 54b62c94 d0affafe 8228ba55 cbefacea 42f914aa 66bcab3f 2b9819a8
    a5b46b39 5bd54a9a 20441e2b 62974e1f 5a6292a2 977014bd 1e3deae6 3aeebb21 694915e4
"""
_SERVER_SECRET = "a11af9f05531f856ad47116b45a950328204b4f44bfb6b3a4b4f1f3fcb631643"
_SERVER_KEY = "9f02283b6c9c07efc26bb9f2ac92e356"
_SERVER_IV = "cf782b88dd83549aadf1e984"
_SERVER_RECORD = """
    17030300 432e937e 11ef4ac7 40e538ad 36005fc4 a46932fc 3225d05f 82aa1b36 e30efaf9
    7d90e6df fc602dcb 501a59a8 fcc49c4b f2e5f0a2 1c0047c2 abf33254 0dd032e1 67c2955d
"""


class _Kernel:
    """In place of a socket: what it was told, and the very buffers that it was told it with.

    :ivar refuses: the number of the call that fails.
    """

    def __init__(self, refuses: int | None = None) -> None:
        self.told: list[tuple[int, int, bytes]] = []
        self.buffers: list[bytearray] = []
        self._refuses = refuses

    def setsockopt(self, level: int, option: int, value: bytes | bytearray) -> None:
        if len(self.told) == self._refuses:
            raise OSError(errno.EINVAL, "Invalid argument")
        self.told.append((level, option, bytes(value)))
        if isinstance(value, bytearray):
            self.buffers.append(value)


def _install(kernel: _Kernel, keys: TrafficKeys) -> None:
    install(cast(socket.socket, kernel), keys)


def _numbers(kernel: _Kernel) -> list[int]:
    """Return the numbers of the next records, sending and receiving."""
    return [struct.unpack(">Q", value[-8:])[0] for _, _, value in kernel.told[1:]]


def _rfc() -> TrafficKeys:
    """Return what the client of RFC 8448 would leave to its kernel."""
    return TrafficKeys(
        "TLS_AES_128_GCM_SHA256",
        bytearray.fromhex(_CLIENT_SECRET),
        bytearray.fromhex(_SERVER_SECRET),
        bytes.fromhex(_CLIENT_RECORD),
        bytes.fromhex(_SERVER_RECORD),
    )


class Rfc8448Tests(SynchronousTestCase):
    def test_what_the_kernel_is_told(self) -> None:
        """First the protocol, then sending, then receiving, with the RFC's keys and numbers."""
        kernel = _Kernel()
        _install(kernel, _rfc())
        client_iv, server_iv = bytes.fromhex(_CLIENT_IV), bytes.fromhex(_SERVER_IV)
        head = struct.pack("=HH", 0x0304, 51)
        self.assertEqual(
            kernel.told,
            [
                (6, 31, b"tls"),
                # The client has sent record 0, and the server a ticket before its record.
                (282, 1, head + client_iv[4:] + bytes.fromhex(_CLIENT_KEY) + client_iv[:4]
                 + (1).to_bytes(8, "big")),
                (282, 2, head + server_iv[4:] + bytes.fromhex(_SERVER_KEY) + server_iv[:4]
                 + (2).to_bytes(8, "big")),
            ],
        )  # fmt: skip

    def test_nothing_sent_yet(self) -> None:
        """A direction without a record begins with number 0."""
        kernel = _Kernel()
        keys = _rfc()
        _install(kernel, TrafficKeys(keys.cipher, keys.sending, keys.receiving, b"", b""))
        self.assertEqual(_numbers(kernel), [0, 0])


class WipingTests(SynchronousTestCase):
    def check(self, kernel: _Kernel, keys: TrafficKeys) -> None:
        """Check that nothing is left of the secrets, nor of what was made of them."""
        for one in (keys.sending, keys.receiving, *kernel.buffers):
            self.assertEqual(bytes(one), bytes(len(one)))

    def test_done(self) -> None:
        """Once the kernel has the keys, nobody else has."""
        kernel, keys = _Kernel(), _rfc()
        _install(kernel, keys)
        self.assertEqual(len(kernel.buffers), 2)
        self.check(kernel, keys)

    def test_refused(self) -> None:
        """Whichever step the kernel refuses, nothing is left, and the reason says why."""
        for step in range(3):
            kernel, keys = _Kernel(refuses=step), _rfc()
            error = self.assertRaises(LocalError, _install, kernel, keys)
            self.assertIn("Invalid argument", error.text)
            self.check(kernel, keys)

    def test_wrong_record(self) -> None:
        """A record that is not of this session is an error, the kernel is told nothing."""
        for name in ("last_sent", "last_received"):
            keys = _rfc()
            records = {"last_sent": keys.last_sent, "last_received": keys.last_received}
            records[name] = records[name][:-1] + bytes([records[name][-1] ^ 1])
            wrong = TrafficKeys(keys.cipher, keys.sending, keys.receiving, **records)
            kernel = _Kernel()
            error = self.assertRaises(LocalError, _install, kernel, wrong)
            self.assertIn(name.removeprefix("last_"), error.text)
            self.assertEqual(kernel.told, [])
            self.check(kernel, wrong)

    def test_unknown_cipher(self) -> None:
        """A cipher that no kernel has is named."""
        keys = _rfc()
        other = TrafficKeys("TLS_AES_128_CCM_SHA256", keys.sending, keys.receiving, b"", b"")
        kernel = _Kernel()
        error = self.assertRaises(LocalError, _install, kernel, other)
        self.assertIn("TLS_AES_128_CCM_SHA256", error.text)
        self.check(kernel, other)

    def test_representation(self) -> None:
        """Whoever prints the keys sees nothing of them, nor does a reader of an error."""
        keys = _rfc()
        shown = f"{keys!r} {keys} {[keys]}"
        for secret in (_CLIENT_SECRET, _SERVER_SECRET):
            self.assertNotIn(secret[:8], shown)
            self.assertNotIn(repr(bytes.fromhex(secret))[2:10], shown)
        self.assertNotIn("x", shown.replace("<TrafficKeys>", ""))


class NumberTests(SynchronousTestCase):
    @given(st.sampled_from(CIPHERS), st.integers(0, 40), st.integers(0, 40), st.randoms())
    def test_any(self, cipher: str, sent: int, received: int, random: object) -> None:
        """However many records there were, the next number is found in each direction."""
        # What the kernel is told for a session without records has key and iv in it.
        secret = bytes(range(48 if "384" in cipher else 32))
        kernel = _Kernel()
        _install(kernel, TrafficKeys(cipher, bytearray(secret), bytearray(secret), b"", b""))
        records = [_seal(cipher, kernel.told[1][2], number) for number in (sent, received)]
        kernel = _Kernel()
        _install(kernel, TrafficKeys(cipher, bytearray(secret), bytearray(secret), *records))
        self.assertEqual(_numbers(kernel), [sent + 1, received + 1])

    def test_sessions(self) -> None:
        """The numbers of real sessions count the tickets that OpenSSL's server sends."""
        for cipher in CIPHERS:
            with self.subTest(cipher):
                numbers = {}
                pair = tcp_pair()
                for sock in pair:
                    self.addCleanup(sock.close)
                for name, end in zip(("client", "server"), sessions(cipher, *pair), strict=True):
                    kernel = _Kernel()
                    _install(kernel, end.keys())
                    numbers[name] = _numbers(kernel)
                self.assertEqual(numbers, {"client": [1, 3], "server": [3, 1]})


def _seal(cipher: str, info: bytes, number: int) -> bytes:
    """Return a record with that number, under the key that the kernel was told of."""
    info = info[4:-8]
    aead: AESGCM | ChaCha20Poly1305
    if "CHACHA20" in cipher:
        iv, aead = info[:12], ChaCha20Poly1305(info[12:])
    else:
        iv, aead = info[-4:] + info[:8], AESGCM(info[8:-4])
    nonce = (int.from_bytes(iv, "big") ^ number).to_bytes(12, "big")
    content = b"data\x17"
    header = b"\x17\x03\x03" + (len(content) + 16).to_bytes(2, "big")
    return header + aead.encrypt(nonce, content, header)


class ProbeTests(SynchronousTestCase):
    def test_reason(self) -> None:
        """On any kernel there is an answer: ciphers that work, or a reason why none does."""
        found = probe()
        self.assertEqual(bool(found), not found.reason)
        self.assertLessEqual(set(found.ciphers), set(CIPHERS))
        self.assertEqual(found, probe())

    def test_truth(self) -> None:
        """No cipher is no kernel TLS."""
        self.assertFalse(KernelTls((), "there is none"))
        self.assertTrue(KernelTls(CIPHERS))
