"""``qmigctl inspect`` as a process: what it says, of what, and how much memory it takes."""

from __future__ import annotations

import io
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID
from xml.etree import ElementTree

import numpy as np
from twisted.trial.unittest import SynchronousTestCase

from qmigd.cli.inspect_files import opened
from qmigd.cli.inspecting import Progress
from qmigd.cli.main import main
from qmigd.cli.options import Exit
from qmigd.stream import multifd, writer
from qmigd.stream.format import MAX_DESCRIPTION, CommandNumber, RamBlock, RamFlag, SectionType
from qmigd.stream.mapped_ram import MappedWriter
from qmigd.stream.records import RamWriter
from qmigd.wire import saved

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PAGE = 4096
EOS = struct.pack(">Q", RamFlag.EOS)
BLOCKS = (RamBlock("pc.ram", 64 * PAGE), RamBlock("vga.vram", 16 * PAGE))
RAM = writer.section_start(SectionType.START, 2, "ram", 0, 4)
DEVICE = {
    "name": "rtc", "instance_id": 0, "vmsd_name": "mc146818", "version": 3, "fields": [
        {"name": "cmos", "type": "buffer", "size": 100},
        {"name": "irq", "type": "struct", "size": 5, "array_len": 2, "struct": {
            "vmsd_name": "irq", "version": 1, "fields": [
                {"name": "level", "type": "bool", "size": 1},
                {"name": "count", "type": "uint32", "size": 4}]}},
        {"name": "time", "type": "int64", "size": 8}],
}  # fmt: skip
STATE = bytes(100) + b"\1\0\0\0\7" + b"\0\0\0\0\x08" + b"\xff" * 8


def description(*devices: Any) -> bytes:
    return writer.description(json.dumps({"page_size": PAGE, "devices": devices}).encode())


def beginning(*capabilities: str) -> bytes:
    return (
        writer.header()
        + writer.configuration("pc-q35-9.0", capabilities=capabilities or None, uuid=bytes(16))
        + writer.open_return_path()
    )


def ending() -> bytes:
    device = writer.section_start(SectionType.FULL, 7, "rtc", 0, 3) + STATE + writer.section_end(7)
    return device + writer.end() + description(DEVICE)


def records() -> bytes:
    ram = RamWriter(PAGE)
    pages = np.arange(4 * PAGE, dtype=np.uint32).astype(np.uint8).reshape(4, PAGE)
    parts = [
        *ram.pages("pc.ram", np.arange(4) * PAGE, pages),
        *ram.zeros("pc.ram", np.arange(4, 64) * PAGE),
        *ram.zeros("vga.vram", np.arange(16) * PAGE),
        *ram.pages("pc.ram", [0], pages[:1] * 0),
    ]
    return b"".join(bytes(part) for part in parts)


def stream() -> bytes:
    part = writer.section_start(SectionType.END, 2)
    setup = RAM + writer.ram_setup(BLOCKS) + EOS + writer.section_end(2)
    return beginning() + setup + part + records() + EOS + writer.section_end(2) + ending()


def mapped(at: int = 0) -> bytes:
    """A file with mapped-ram, of which every other page of the first block is there."""
    place = MappedWriter(PAGE)
    start = beginning("mapped-ram") + RAM
    placed = [(at, start), *place.setup(at + len(start), BLOCKS)]
    placed += place.pages("pc.ram", np.arange(0, 64, 2) * PAGE, np.ones((32, PAGE), np.uint8))
    placed += [*place.bitmaps(), (place.position, EOS + writer.section_end(2) + ending())]
    image = bytearray(max(where + len(part) for where, part in placed) - at)
    for where, part in placed:
        image[where - at : where - at + len(part)] = part
    return bytes(image)


def saved_guest(format: str, features: Sequence[str], part: bytes) -> bytes:
    """What ``qmigctl save`` would have written."""
    head = saved.Head(
        format, tuple(features), True, {"name": "web1", "machine": "pc-q35-9.0"}, 1.7e9, "0.1.0",
        length=len(part), checksum=bytes(range(32)),
    )  # fmt: skip
    head = replace(head, offset=saved.offset_for(head))
    return saved.encode(head, complete=True) + part


def qmigctl(*words: str) -> tuple[int, str, str]:
    """Run qmigctl in this process; returns its exit code and what it printed."""
    out, err = io.TextIOWrapper(io.BytesIO()), io.TextIOWrapper(io.BytesIO())
    code = None
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(words)
        except SystemExit as end:
            code = end.code
    said = []
    for one in (out, err):
        one.seek(0)
        said.append(one.read())
    assert isinstance(code, int)
    return code, said[0], said[1]


def process(
    *words: str, given: bytes | None = None, path: str | None = None
) -> tuple[int, str, str, int]:
    """Run ``qmigctl inspect`` as a process, with a pipe for its standard input.

    :param given: what comes through the pipe; or what is in the file ``path`` does.
    :returns: exit code, stdout, stderr, and how much memory it took at most, in bytes.
    """
    script = (
        "import atexit, re, sys\n"
        "from qmigd.cli.main import main\n"
        "peak = lambda: re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]\n"
        "atexit.register(lambda: sys.stderr.write('peak ' + peak()))\n"
        "main()\n"
    )
    cat = None
    if path is not None:
        cat = subprocess.Popen(["cat", path], stdout=subprocess.PIPE)
    done = subprocess.run(
        [sys.executable, "-c", script, "inspect", *words],
        stdin=None if cat is None else cat.stdout,
        input=given,
        capture_output=True,
        check=False,
    )
    if cat is not None and cat.stdout is not None:
        cat.stdout.close()
        cat.wait()
    errors, _, peak = str(done.stderr, "utf-8").rpartition("peak ")
    return done.returncode, str(done.stdout, "utf-8"), errors, int(peak) << 10


class InspectCase(SynchronousTestCase):
    def file(self, data: bytes, name: str = "stream") -> str:
        path = Path(self.mktemp()).absolute()
        path.mkdir(parents=True)
        (path / name).write_bytes(data)
        return str(path / name)

    def text(self, *arguments: str) -> str:
        """Return what it says of a good file."""
        code, out, errors = qmigctl("inspect", *arguments)
        self.assertEqual((0, ""), (code, errors))
        return out

    def answer(self, *arguments: str) -> Any:
        """Return the JSON that it prints."""
        code, out, errors = qmigctl("inspect", "--json", *arguments)
        answer = json.loads(out)
        self.assertEqual((1 if "error" in answer else 0, ""), (code, errors))
        return answer

    def rows(self, text: str, head: str) -> dict[str, list[str]]:
        """Return the rows of a table by their first cells."""
        table = text.partition(f"\n{head}")[2].partition("\n\n")[0].splitlines()[1:]
        cells = [re.split(" {2,}", line) for line in table]
        return {row[0]: row[1:] for row in cells}


class StreamTests(InspectCase):
    def test_text(self) -> None:
        """A person is told of machine, RAM, passes, sections and where the bytes went."""
        path = self.file(stream())
        text = self.text(path)
        self.assertIn(f"{path}: QEMU's migration stream, ", text)
        self.assertIn("complete", text.splitlines()[0])
        self.assertNotIn("not complete", text)
        for line in (
            "machine       pc-q35-9.0",
            "UUID          00000000-0000-0000-0000-000000000000",
            "capabilities  return-path",
            "RAM           320 KiB, in pages of 4096",
            "commands      open-return-path",
            "blank         1 of the normal pages are all zeros",
        ):
            self.assertIn(f"\n{line}\n", text)
        self.assertEqual(["256 KiB", "5", "60"], self.rows(text, "RAM BLOCK")["pc.ram"])
        self.assertEqual(["64.0 KiB", "0", "16"], self.rows(text, "RAM BLOCK")["vga.vram"])
        passes = self.rows(text, "PASS")
        self.assertEqual((["4", "76"], ["1", "0"]), (passes["1"][:2], passes["2"][:2]))
        sections = self.rows(text, "SECTION")
        self.assertEqual(["0", "4", "2", "20.8 KiB"], sections["ram"])
        self.assertEqual(["0", "3", "1", "140 B"], sections["rtc"])
        self.assertIn("'--fields' or '--json'", text)

    def test_fields(self) -> None:
        """With --fields, what the devices' state is."""
        text = self.text("--fields", self.file(stream()))
        self.assertIn("\nrtc 0, version 3, 140 B at 0x", text)
        for line in (
            f"cmos = {'00' * 50} ... (200 characters)",
            "irq[0].level = true",
            "irq[1].count = 8",
            "time = -1",
        ):
            self.assertIn(f"\n  {line}\n", text)

    def test_json(self) -> None:
        """A program is told the same, with all fields."""
        data = stream()
        answer = self.answer(self.file(data))
        self.assertTrue(answer["complete"])
        self.assertEqual(len(data), answer["size"])
        self.assertEqual(len(data), sum(answer["bytes"].values()))
        self.assertEqual(5 * (PAGE + 8), answer["bytes"]["normal"])
        self.assertEqual(["return-path"], answer["capabilities"])
        self.assertEqual({"normal": 5, "zero": 76}, answer["ram"]["pages"])
        self.assertEqual(1, answer["ram"]["blank"])
        self.assertEqual([4, 1], [one["pages"]["normal"] for one in answer["ram"]["passes"]])
        self.assertEqual({"open-return-path": 1}, answer["commands"])
        (device,) = answer["devices"]
        self.assertEqual(
            {
                "cmos": "00" * 100,
                "irq": [{"level": True, "count": 7}, {"level": False, "count": 8}],
                "time": -1,
            },
            device["fields"],
        )
        self.assertEqual(data.index(b"\x04\0\0\0\x07\x03rtc"), device["at"])

    def test_several_pieces(self) -> None:
        """What is in the middle of a record where a piece ends is not lost."""
        many = beginning() + RAM + writer.ram_setup([RamBlock("a", 1 << 24)]) + EOS
        many += writer.section_end(2) + writer.section_start(SectionType.END, 2)
        pages = np.ones((1000, PAGE), np.uint8)
        parts = RamWriter(PAGE).pages("a", np.arange(1000) * PAGE, pages)
        many += b"".join(bytes(part) for part in parts) + EOS + writer.section_end(2) + ending()
        self.assertEqual({"normal": 1000}, self.answer(self.file(many))["ram"]["pages"])

    def test_unread(self) -> None:
        """Whoever has read enough may go."""
        path = self.file(stream())
        for option in ("--json", "--fields"):
            code = f"import sys; sys.argv[1:] = ['inspect', {option!r}, {path!r}]\n"
            code += "import os; os.read(0, 1)\nfrom qmigd.cli.main import main; main()"
            process = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
            )
            assert process.stdout is not None
            process.stdout.close()
            process.stdout = None
            _, errors = process.communicate(b"\n")
            self.assertEqual((Exit.UNKNOWN, b""), (process.returncode, errors))

    def test_not_described(self) -> None:
        """Devices that nothing is said of, or something wrong, are told with the reason."""
        head = writer.section_start(SectionType.FULL, 7, "rtc", 0, 3)
        device = head + STATE + writer.section_end(7)
        wrong = {**DEVICE, "fields": [{"name": "x", "type": "buffer", "size": 119}]}
        for end, reason in (
            (b"", "no description of it"),
            (description(), "no description of it"),
            (description({**DEVICE, "name": "other"}), "no description of it"),
            (writer.description(b"{nonsense}"), "JSON in the description"),
        ):
            answer = self.answer(self.file(beginning() + device + writer.end() + end))
            (told,) = answer["devices"]
            self.assertIn(reason, told["reason"])
            self.assertTrue(answer["complete"])
        answer = self.answer(self.file(beginning() + device + writer.end() + description(wrong)))
        self.assertEqual("stream", answer["error"]["class"])

    def test_postcopy(self) -> None:
        """A migration that was switched to postcopy says so, and how much came afterwards."""
        listen = writer.command(CommandNumber.POSTCOPY_LISTEN)
        run = writer.command(CommandNumber.POSTCOPY_RUN)
        package = listen + run
        data = beginning() + RAM + writer.ram_setup(BLOCKS) + EOS + writer.section_end(2)
        data += writer.command(CommandNumber.PACKAGED, len(package).to_bytes(4, "big")) + package
        data += writer.section_start(SectionType.END, 2) + records() + EOS + writer.section_end(2)
        path = self.file(data + writer.end())
        self.assertIn(
            "postcopy      after a package of 10 B, then 5 normal, 76 zero", self.text(path)
        )
        answer = self.answer(path)
        self.assertEqual({"package": 10, "pages": {"normal": 5, "zero": 76}}, answer["postcopy"])
        self.assertEqual([], answer["ram"]["passes"])


class FileTests(InspectCase):
    def test_mapped_ram(self) -> None:
        """With mapped-ram, pages are counted by the bitmaps, and their places passed over."""
        data = mapped()
        answer = self.answer(self.file(data))
        self.assertEqual(["mapped-ram", "return-path"], answer["capabilities"])
        self.assertEqual({"normal": 32}, answer["ram"]["pages"])
        self.assertEqual(32 * PAGE, answer["bytes"]["normal"])
        self.assertEqual(len(data), answer["size"])
        self.assertEqual(len(data), sum(answer["bytes"].values()))
        self.assertEqual(-1, answer["devices"][0]["fields"]["time"])

    def test_saved(self) -> None:
        """What 'qmigctl save' wrote in front is told, for each format."""
        for format, features, part in (
            ("stream", (), stream()),
            ("zstd", (), zstd.compress(stream())),
            ("mapped-ram", ("mapped-ram", "multifd"), mapped(4096)),
        ):
            path = self.file(saved_guest(format, features, part))
            text = self.text(path)
            for line in (
                f"saved         2023-11-14 22:13:20+00:00, by qmigd 0.1.0, as {format}",
                "guest         web1, which ran",
                f"checksum      {bytes(range(32)).hex()}",
                "machine       pc-q35-9.0",
            ):
                self.assertIn(f"\n{line}\n", text)
            answer = self.answer(path)
            self.assertEqual(format, answer["saved"]["format"])
            self.assertEqual("web1", answer["saved"]["guest"]["name"])
            self.assertLessEqual({*features}, {*answer["capabilities"]})
            self.assertEqual(format == "zstd", answer["compressed"])
            self.assertEqual(-1, answer["devices"][0]["fields"]["time"], format)

    def test_pipe(self) -> None:
        """What cannot be looked at from the end is read from a pipe as it comes."""
        for data in (
            stream(),
            zstd.compress(stream()),
            mapped(),
            saved_guest("stream", (), stream()),
            saved_guest("mapped-ram", ("mapped-ram",), mapped(4096)),
        ):
            code, out, errors, _ = process("--json", "-", given=data)
            self.assertEqual((0, ""), (code, errors))
            answer = json.loads(out)
            self.assertEqual("standard input", answer["file"])
            self.assertEqual(-1, answer["devices"][0]["fields"]["time"])

    def test_multifd(self) -> None:
        """Channels that were captured beside a stream are counted with it, in any order."""
        flush = struct.pack(">Q", RamFlag.MULTIFD_FLUSH)
        main = beginning() + RAM + writer.ram_setup(BLOCKS) + flush + EOS + writer.section_end(2)
        paths = [self.file(main + ending())]
        for number in range(2):
            packer = multifd.Packer(page_size=PAGE, compression="zlib")
            pages = [np.ones(3 * PAGE, np.uint8).data]
            parts = [
                multifd.Initial(UUID(int=1), number).encode(),
                *packer.pages(number, "pc.ram", np.arange(3) * PAGE, pages, [5 * PAGE]),
                packer.sync(9),
            ]
            paths.insert(0, self.file(b"".join(bytes(part) for part in parts)))
        answer = self.answer(*paths)
        self.assertIn("multifd", answer["capabilities"])
        self.assertEqual({"multifd-normal": 6, "multifd-zero": 2}, answer["ram"]["pages"])
        expected = {
            "packets": 2, "syncs": 1, "compression": ["zlib"],
            "pages": {"normal": 3, "zero": 1}, "device-state": 0,
        }  # fmt: skip
        self.assertEqual(
            [{"channel": 1, **expected}, {"channel": 0, **expected}], answer["channels"]
        )
        self.assertEqual(["2", "1", "3", "1", "zlib"], self.rows(
            self.text(*paths), "MULTIFD CHANNEL"
        )["0"])  # fmt: skip
        code, _, errors = qmigctl("inspect", paths[0])
        self.assertEqual(Exit.REFUSED, code)
        self.assertIn("the stream that it belongs to has to be named as well", errors)
        code, _, errors = qmigctl("inspect", paths[-1], paths[-1])
        self.assertEqual(Exit.REFUSED, code)
        self.assertIn("one stream is inspected at a time", errors)


class WrongTests(InspectCase):
    def failed(self, data: bytes, offset: int, expected: str, found: str) -> str:
        """Check what is said of a bad file; returns what was said before that."""
        path = self.file(data)
        code, out, errors = qmigctl("inspect", path)
        self.assertEqual(Exit.FAILED, code)
        start = f"^qmigctl: {path}: at offset {offset:#x}.*: expected .*"
        self.assertRegex(errors, start + expected)
        self.assertRegex(errors, f"found .*{found}.*\\.\n$")
        error = self.answer(path)["error"]
        self.assertEqual(("stream", path, offset), (error["class"], error["file"], error["offset"]))
        return out

    def test_cut(self) -> None:
        """A cut file says where, and what was expected; what is in front of that is told."""
        data = stream()
        out = self.failed(data[:20000], 0x437A, "a page of RAM", "the end after 2726 bytes")
        self.assertIn("not complete", out)
        self.assertEqual(["256 KiB", "4", "60"], self.rows(out, "RAM BLOCK")["pc.ram"])
        data = mapped()
        self.failed(data[:-100], len(data) - 100, "bytes of the description", "the end")

    def test_garbled(self) -> None:
        """So does one with a wrong byte."""
        data = bytearray(stream())
        at = data.index(b"\x04\0\0\0\x07\x03rtc")
        data[at] = 9
        self.failed(bytes(data), at, "a section, a command or the end", "09")
        data[at] = 4
        data[at - 5] = 0x7D
        self.failed(bytes(data), at - 5, "the footer of section 2, 'ram'", "7d00000002")

    def test_no_stream(self) -> None:
        """Of a file that is none, nothing else is said."""
        self.assertEqual("", self.failed(b"something else", 0, "the magic b'QEVM'", "b'some'"))
        self.assertEqual("", self.failed(b"", 0, "the magic", "the end"))

    def test_mapped_cut(self) -> None:
        """The places of pages have to be there, although they are not looked at."""
        data = mapped()[: (1 << 20) + 100]
        self.failed(data, len(data), "the pages of 'pc.ram' up to 0x140000", "the end")

    def test_compressed(self) -> None:
        """What zstd compressed is cut, damaged, or wants more memory than there should be."""
        packed = zstd.compress(stream())
        self.failed(packed[:-4], len(packed) - 4, "the rest of what zstd has compressed", "the end")
        packed = zstd.compress(stream() + b"!")
        self.failed(packed, len(stream()), "the end of the stream", "21")
        window = zstd.ZstdCompressor(options={zstd.CompressionParameter.window_log: 27})
        huge = window.compress(stream()) + window.flush()
        for data, expected in (
            (packed[:10] + b"\xff" * 20 + packed[30:], " is damaged: "),
            (huge, "zstd would need more than 16 MiB"),
        ):
            code, _, errors = qmigctl("inspect", self.file(data))
            self.assertEqual(Exit.FAILED, code)
            self.assertIn(expected, errors)

    def test_saved(self) -> None:
        """A saved guest whose head is not right is refused by that."""
        data = saved_guest("stream", (), stream())
        for bad, expected in (
            (data[:-1], "it was cut, or something was added to it."),
            (data[:50] + b"x" + data[51:], "its head is damaged"),
            (saved_guest("zstd", (), stream()), "its head says that it is zstd, and it is not."),
        ):
            code, out, errors = qmigctl("inspect", self.file(bad))
            self.assertEqual((Exit.REFUSED, ""), (code, out))
            self.assertIn(expected, errors)
        code, _, errors, _ = process("-", given=data[:-1])
        self.assertEqual(Exit.FAILED, code)
        self.assertIn(f"standard input: at offset {len(data) - 1:#x}: expected a saved", errors)

    def test_files(self) -> None:
        """What cannot be read or written is said."""
        path = self.file(stream())
        for arguments, expected in (
            (["/nonexistent"], "/nonexistent cannot be read: No such file or directory."),
            (["/"], "/ cannot be read: Is a directory."),
            (["--plot", "/nonexistent/x.svg", path], "/nonexistent/x.svg cannot be written"),
            ([], "FILE"),
        ):
            code, _, errors = qmigctl("inspect", *arguments)
            self.assertEqual(Exit.REFUSED, code)
            self.assertIn(expected, errors)


class PlotTests(InspectCase):
    def test_picture(self) -> None:
        """The picture is a small SVG that names all kinds of bytes that there are."""
        for data, kinds in (
            (stream(), ("pages as they are", "pages of zeros", "devices", "headers and all else")),
            (mapped(), ("bitmaps of mapped-ram", "places without a page")),
        ):
            path = self.file(data, "a<b>&c")
            plot = f"{path}.svg"
            self.text("--plot", plot, path)
            root = ElementTree.parse(plot).getroot()
            said = [text.text for text in root.iter("{http://www.w3.org/2000/svg}text")]
            self.assertIn("a<b>&c: pc-q35-9.0, ", str(said[0]))
            for kind in (*kinds, "rtc"):
                self.assertIn(kind, said)
            self.assertLess(os.stat(plot).st_size, 40_000)


class MemoryTests(InspectCase):
    #: Bytes, for a stream of any size.
    most = 64 << 20

    def check(self, *arguments: str, pipe: str | None = None) -> None:
        """Inspect something large."""
        code, _, errors, peak = process("--json", *arguments, path=pipe)
        self.assertEqual((0, ""), (code, errors))
        self.assertLess(peak, self.most)

    def test_long_stream(self) -> None:
        """However long a stream is, it takes the same memory."""
        run = np.zeros((4096, PAGE + 8), np.uint8)
        run[:, 100] = 1
        path = self.file(b"")
        with open(path, "wb") as file:
            file.write(beginning() + RAM + writer.ram_setup([RamBlock("a", 1 << 30)]) + EOS)
            file.write(writer.section_end(2) + writer.section_start(SectionType.END, 2))
            file.write(b"".join(map(bytes, RamWriter(PAGE).zeros("a", [0]))))
            for first in range(0, 1 << 15, 4096):
                heads = np.arange(first, first + 4096, dtype=">u8") * PAGE | 0x28
                run[:, :8] = heads.astype(">u8").view(np.uint8).reshape(-1, 8)
                file.write(run.data)
            file.write(EOS + writer.section_end(2) + ending())
        self.check(path)
        self.check("-", pipe=path)
        packer = zstd.ZstdCompressor()
        with open(path, "rb") as file, open(f"{path}.zst", "wb") as packed:
            while piece := file.read(1 << 20):
                packed.write(packer.compress(piece))
            packed.write(packer.flush())
        self.check(f"{path}.zst")

    def test_hostile(self) -> None:
        """Nor does one that was made to take much."""
        device = writer.section_start(SectionType.FULL, 7, "rtc", 0, 3) + STATE
        whole = beginning() + device + writer.section_end(7) + writer.end()
        text = json.dumps({"page_size": PAGE, "devices": [DEVICE]}).encode()
        filled = text[:-1] + b"," + b'"x":' + b"[]" + b"}"
        filled = filled.replace(b"[]", b"[" + b"{}," * 200_000 + b"0]")
        filled = filled.ljust(MAX_DESCRIPTION)
        numbers = {"name": "n", "type": "uint16", "size": 2, "array_len": 1 << 17}
        large = {"name": "rtc", "instance_id": 0, "fields": [numbers]}
        sections = b"".join(
            writer.section_start(SectionType.FULL, number, f"{number:0250}", 0, 1)
            + bytes(2100)
            + writer.section_end(number)
            for number in range(3000)
        )
        blocks = writer.ram_setup([RamBlock(f"{n:0250}", PAGE) for n in range(4096)])
        ram = RAM + blocks + EOS + writer.section_end(2)
        pages = [struct.pack(">Q", 2) + b"\xfa" + b"%0250d" % n + b"\0" for n in range(4095, 0, -1)]
        part = writer.section_start(SectionType.END, 2) + b"".join(pages) + EOS
        for data in (
            beginning() + ram + part + writer.section_end(2) + writer.end(),
            whole + writer.description(filled),
            beginning()
            + writer.section_start(SectionType.FULL, 7, "rtc", 0, 3)
            + b"\xff\xfe" * (1 << 17) + writer.section_end(7)
            + writer.end()
            + description(large),
            beginning() + sections + writer.end() + writer.description(filled),
        ):  # fmt: skip
            self.check(self.file(data))


class ProgressTests(SynchronousTestCase):
    def test_terminal(self) -> None:
        """On a terminal it is shown how far it is, after a while, and the line is cleared."""

        class Terminal(io.StringIO):
            def isatty(self) -> bool:
                return True

        path = self.mktemp()
        Path(path).write_bytes(stream() * 200)
        source, out, now = opened(path), Terminal(), [0.0]
        assert source.size is not None
        progress = Progress(out, source.size, lambda: now[0])
        source.read()
        progress.add(source)
        self.assertEqual("", out.getvalue())
        now[0] = 1
        source.read()
        progress.add(source)
        self.assertRegex(out.getvalue(), r"^\r1\.0 MiB of 4\.\d MiB read, 2\d %$")
        progress.close()
        self.assertRegex(out.getvalue(), r"\r *\r$")
        source.close()
        quiet = io.StringIO()
        progress = Progress(quiet, 10, lambda: now[0])
        now[0] = 5
        progress.add(source)
        progress.close()
        self.assertEqual("", quiet.getvalue())
