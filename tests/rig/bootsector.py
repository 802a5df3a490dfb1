"""The guest: a boot sector that counts, dirties its RAM, and leaves a pattern to check.

It runs in 32-bit mode, from timer interrupt to timer interrupt, and sleeps in
between, so that an unhurried guest costs its host next to nothing:

- once: fill every page of the *window* with generation 1;
- each tick: write some pages of the window, one after another, going round;
  then write one line to the serial port, the number of the tick (8 hexadecimal
  digits, from 0).

A page is 512 times the pair *generation*, *address of the page* (32 bits each,
little endian).  Each time round, the generation goes up by one.  So whenever the
guest is stopped, the window holds generation g up to one word and g-1 from there
on, and every page holds its own address: a page that is lost, stale, torn or in
a wrong place shows (:func:`check`).  The serial lines of one guest, taken
together over all the hosts that it ran on, are 0, 1, 2 ... without a gap.

The code is written down here as bytes; there is no assembler.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

__all__ = ["PAGE", "Inconsistent", "Program", "Window", "check", "image"]

#: Bytes in a page.
PAGE = 4096

_ORIGIN = 0x7C00  # where a BIOS loads a boot sector
_IDT = 0x1000  # low RAM that nobody uses any more
_VECTOR = 0x20  # of the timer, once the interrupt controller is programmed
_PIT_HZ = 1_193_182
_COM1 = 0x3F8
_FLOPPY = 1440 * 1024


@dataclass(frozen=True)
class Program:
    """What the guest does.

    :ivar start: address of the window, a multiple of :data:`PAGE`, at least 1 MiB.
    :ivar pages: the window's length in pages.
    :ivar pages_per_tick: how many of them are written each tick; 0 for an idle guest.
    :ivar ticks_per_second: from 19 to 1000.

    It dirties ``pages_per_tick * ticks_per_second * PAGE`` bytes a second, or
    what the host's CPU is able to.
    """

    start: int = 4 << 20
    pages: int = 2048
    pages_per_tick: int = 16
    ticks_per_second: int = 100

    def __post_init__(self) -> None:
        if self.start < 1 << 20 or self.start % PAGE or self.pages < 1:
            raise ValueError(f"There is no window at {self.start:#x} of {self.pages} pages.")
        if not 19 <= self.ticks_per_second <= 1000:
            raise ValueError(f"The timer does not do {self.ticks_per_second} ticks a second.")

    @property
    def end(self) -> int:
        """The first address behind the window."""
        return self.start + self.pages * PAGE

    @property
    def dirty_rate(self) -> int:
        """Bytes of RAM that it dirties in a second, once it runs unhindered."""
        return self.pages_per_tick * self.ticks_per_second * PAGE


class Inconsistent(AssertionError):
    """RAM does not hold what the guest wrote; the text says where and what."""


@dataclass(frozen=True)
class Window:
    """What a consistent window holds.

    :ivar generation: that of its first word.
    :ivar boundary: address of the first word of the generation before; the
        window's end if there is none.
    """

    generation: int
    boundary: int


def check(dump: bytes | bytearray, program: Program) -> Window:
    """Check a dump of the window, taken after the guest's first line.

    :raises Inconsistent: it cannot have come out of one guest at one time.
    """
    window = memoryview(dump)
    if len(window) != program.end - program.start:
        raise Inconsistent(f"The dump has {len(dump)} bytes, not the window's.")
    generation = first = int.from_bytes(window[:4], "little")
    if not first:
        raise Inconsistent("The window was never written.")
    boundary = program.end
    for offset in range(0, len(window), PAGE):
        address = program.start + offset
        page = window[offset : offset + PAGE]
        if page == _page(generation, address):
            continue
        if generation == first and page == _page(first - 1, address):
            boundary, generation = address, first - 1
            continue
        at = _first_difference(page, _page(generation, address))
        if generation == first and page == _torn(first, address, at):
            boundary, generation = address + at, first - 1
            continue
        word = int.from_bytes(page[at : at + 4], "little")
        raise Inconsistent(
            f"The word at {address + at:#x} is {word:#x}; the page is at {address:#x} and "
            f"should hold generation {generation} (the window begins with {first})."
        )
    return Window(first, boundary)


def _page(generation: int, address: int) -> bytes:
    return struct.pack("<II", generation, address) * (PAGE // 8)


def _torn(generation: int, address: int, at: int) -> bytes:
    """Return a page that was being written when the guest stopped."""
    return _page(generation, address)[:at] + _page(generation - 1, address)[at:]


def _first_difference(one: memoryview, other: bytes) -> int:
    return next(at for at in range(0, PAGE, 4) if one[at : at + 4] != other[at : at + 4])


class _Code:
    """Machine code with names for places in it."""

    def __init__(self, origin: int) -> None:
        self._origin = origin
        self._bytes = bytearray()
        self._places: dict[str, int] = {}
        self._holes: list[tuple[int, int, bool, str]] = []

    def put(self, *pieces: str | int | bytes) -> None:
        """Append bytes: in hexadecimal, as a 32-bit number, or as they are."""
        for piece in pieces:
            if isinstance(piece, int):
                self._bytes += struct.pack("<I", piece)
            else:
                self._bytes += bytes.fromhex(piece) if isinstance(piece, str) else piece

    def place(self, name: str) -> None:
        """Give the present place a name."""
        self._places[name] = self._origin + len(self._bytes)

    def address(self, name: str, size: int) -> None:
        """Append the address of a place, in ``size`` bytes."""
        self._hole(size, False, name)

    def jump(self, opcode: str, name: str, size: int = 1) -> None:
        """Append a jump or a call to a place; its distance takes ``size`` bytes."""
        self.put(opcode)
        self._hole(size, True, name)

    def _hole(self, size: int, relative: bool, name: str) -> None:
        self._holes.append((len(self._bytes), size, relative, name))
        self._bytes += bytes(size)

    def done(self) -> bytes:
        """Return the code with every hole filled.

        :raises OverflowError: a place is too far away for its hole.
        """
        for at, size, relative, name in self._holes:
            value = self._places[name]
            if relative:
                value -= self._origin + at + size
            self._bytes[at : at + size] = value.to_bytes(size, "little", signed=relative)
        return bytes(self._bytes)


def image(program: Program) -> bytes:
    """Return the floppy disk (1440 KiB) that boots into ``program``."""
    code = _Code(_ORIGIN)
    _enter_32_bit_mode(code)
    _set_up_devices(code, program.ticks_per_second)
    _main_loop(code, program)
    _subroutines(code, program)
    sector = code.done()
    if len(sector) > 510:
        raise OverflowError(f"The boot sector has {len(sector)} bytes.")
    return (sector.ljust(510, b"\0") + b"\x55\xaa").ljust(_FLOPPY, b"\0")


def _enter_32_bit_mode(code: _Code) -> None:
    code.put("FA")  # cli
    code.put("31 C0", "8E D8")  # xor ax, ax; mov ds, ax
    code.put("E4 92", "0C 02", "24 FE", "E6 92")  # port 0x92: address line 20 on, no reset
    code.put("0F 01 16")  # lgdt [gdtr]
    code.address("gdtr", 2)
    code.put("0F 01 1E")  # lidt [idtr]
    code.address("idtr", 2)
    code.put("0F 20 C0", "0C 01", "0F 22 C0")  # cr0 |= protected mode
    code.put("EA")  # jmp 0x08:main
    code.address("main", 2)
    code.put("08 00")

    code.place("gdt")
    code.put(bytes(8))
    code.put("FF FF 00 00 00 9A CF 00")  # 0x08: code, from 0, 4 GiB
    code.put("FF FF 00 00 00 92 CF 00")  # 0x10: data, the same
    code.place("gdtr")
    code.put("17 00")
    code.address("gdt", 4)
    code.place("idtr")
    code.put(struct.pack("<HI", (_VECTOR + 1) * 8 - 1, _IDT))

    code.place("main")
    code.put("66 B8 10 00", "8E D8", "8E C0", "8E D0")  # ds, es, ss = 0x10
    code.put("BC", _ORIGIN)  # mov esp, below the code


def _set_up_devices(code: _Code, ticks_per_second: int) -> None:
    gate = _IDT + _VECTOR * 8
    code.put("66 C7 05", gate)  # the timer's gate: offset 15..0 (offset 31..16 is 0)
    code.address("timer", 2)
    code.put("C7 05", gate + 2, 0x8E00_0008)  # selector 0x08, 32-bit interrupt gate
    code.put("66 C7 05", gate + 6, "00 00")
    # Interrupt controllers: vectors from 0x20, everything masked but the timer.
    for port, value in ((0x20, 0x11), (0x21, _VECTOR), (0x21, 4), (0x21, 1), (0x21, 0xFE)):
        _out(code, port, value)
    _out(code, 0xA1, 0xFF)
    # Timer 0: rate generator.
    divisor = _PIT_HZ // ticks_per_second
    for port, value in ((0x43, 0x34), (0x40, divisor & 0xFF), (0x40, divisor >> 8)):
        _out(code, port, value)
    code.put("66 BA", struct.pack("<H", _COM1 + 3), "B0 03", "EE")  # 8 bits, no parity


def _out(code: _Code, port: int, value: int) -> None:
    code.put(bytes([0xB0, value, 0xE6, port]))  # mov al, value; out port, al


def _main_loop(code: _Code, program: Program) -> None:
    # ebx: generation; edi: next address to write; esi: tick
    code.put("BB", 1)  # mov ebx, 1
    code.put("31 F6")  # xor esi, esi
    code.put("BF", program.start)  # mov edi, start
    code.place("fill")
    code.jump("E8", "write page", 4)  # call
    code.put("83 FB 01")  # cmp ebx, 1
    code.jump("74", "fill")  # je: until the first time round is done
    code.put("FB")  # sti

    code.place("tick")
    code.put("F4")  # hlt
    code.put("B9", program.pages_per_tick)  # mov ecx, pages_per_tick
    code.jump("E3", "report")  # jecxz
    code.place("next page")
    code.put("51")  # push ecx
    code.jump("E8", "write page", 4)  # call
    code.put("59")  # pop ecx
    code.jump("E2", "next page")  # loop

    code.place("report")
    code.put("B9", 8)  # mov ecx, 8
    code.place("digit")
    code.put("C1 C6 04")  # rol esi, 4: the highest digit first
    code.put("89 F0", "24 0F")  # mov eax, esi; and al, 15
    code.put("3C 0A", "1C 69", "2F")  # cmp al, 10; sbb al, 0x69; das: now it is ASCII
    code.jump("E8", "put", 4)  # call
    code.jump("E2", "digit")  # loop
    code.put("B0 0A")  # mov al, newline
    code.jump("E8", "put", 4)  # call
    code.put("46")  # inc esi
    code.jump("EB", "tick")  # jmp


def _subroutines(code: _Code, program: Program) -> None:
    code.place("put")  # al to the serial port
    code.put("88 C4")  # mov ah, al
    code.put("66 BA", struct.pack("<H", _COM1 + 5))  # mov dx, line status
    code.place("full")
    code.put("EC", "A8 20")  # in al, dx; test al, 0x20
    code.jump("74", "full")  # jz
    code.put("88 E0")  # mov al, ah
    code.put("66 BA", struct.pack("<H", _COM1), "EE")  # mov dx, data; out dx, al
    code.put("C3")  # ret

    code.place("write page")
    code.put("89 FD")  # mov ebp, edi
    code.put("B9", PAGE // 8)  # mov ecx, pairs
    code.place("pair")
    code.put("89 1F", "89 6F 04")  # mov [edi], ebx; mov [edi+4], ebp
    code.put("83 C7 08")  # add edi, 8
    code.jump("E2", "pair")  # loop
    code.put("81 FF", program.end)  # cmp edi, end
    code.jump("72", "written")  # jb
    code.put("BF", program.start)  # mov edi, start
    code.put("43")  # inc ebx
    code.place("written")
    code.put("C3")  # ret

    code.place("timer")
    code.put("50", "B0 20", "E6 20", "58", "CF")  # acknowledge; iret
