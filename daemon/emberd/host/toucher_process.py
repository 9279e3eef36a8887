"""The toucher: a process that maps the model's files, counts their resident pages and loads them.

A process of its own, because a page fault stops every thread of a Python program, because a file that is truncated
under a mapping is SIGBUS, and because the model's pages must not become the daemon's. It is run by its path, not as
a module, and imports next to nothing: about 10 MB private.

It reads one JSON object a line from standard input and writes such lines to standard output; host/toucher.py is the
other end. The first argument is a JSON object with what this system can do (`Paging` there).

    {"id": 1, "do": "map", "paths": [...]}            {"id": 1, "files": [{"bytes": ..., "pages": ...}], ...}
    {"id": 2, "do": "count", "spans": [[0, 0, 99]]}   {"id": 2, "counts": [[1, 1]], "source": "mincore"}
    {"id": 3, "do": "sample", "pages": 512}           {"id": 3, "resident": 500, "sampled": 512, ...}
            "sample": lambda: self.residency.sample(self.one_or_all(command.get("file")), command["pages"]),
            "look": lambda: self.residency.look(self.mappings, self.stretches(spans), command["pages"]),
    {"id": 4, "do": "touch"}                          {"id": 4, "progress": ...} ..., {"id": 4, "is_complete": ...}
    {"id": 5, "do": "lock"}                           the same, and "locked_bytes", "lock_error"
    {"id": 6, "do": "unlock"}                         {"id": 6}
    {"id": 7, "do": "stop"}                           {"id": 7}

A span is a file's number, the first byte and a length. An error is {"id": ..., "error": kind, "message": ...}. The
end of input ends the process, and with it a lock. One thing at a time: while it touches it obeys `stop` and the end
of input only; other commands wait.
"""

from __future__ import annotations

import ctypes
import fcntl
import json
import mmap
import os
import resource
import select
import stat
import struct
import sys
import time

TYPE_CHECKING = False
"""typing.TYPE_CHECKING, without a MiB for the module."""
if TYPE_CHECKING:
    from collections.abc import Generator, Iterator
    from typing import Any, TypeAlias

    Json: TypeAlias = dict[str, Any]
    Span: TypeAlias = tuple[int, int, int]
    Stretch: TypeAlias = tuple["Mapping", int, int]

PAGE_BYTES = mmap.PAGESIZE
MIB = 1024 * 1024
BLOCK_BYTES = 256 * MIB
"""mincore is asked for so much at a time: up to 64 KiB of answer, and 5 ms if nothing is mapped yet. Read-ahead
ends with the block, so that the next block's cold pages are counted before they are asked for."""
RESIDENT_STEP_BYTES = 8 * MIB
"""Loads between two looks at standard input where pages are resident: 0.1 ms."""
FIRST_STEP_BYTES = MIB
LEAST_STEP_BYTES = 128 * 1024
MOST_STEP_BYTES = 4 * MIB
SHORT_STEP_S, LONG_STEP_S = 0.004, 0.015
"""Cold steps are made longer below, shorter above: a stop is obeyed within 50 ms, on a slow disk too."""
READ_AHEAD_BYTES = 8 * MIB
"""So much is asked of the disk ahead of the loads, in pieces of a MiB."""
READ_AHEAD_PIECE_BYTES = MIB
LOCK_STEP_BYTES = 64 * MIB
"""mlock of resident pages, between two looks at standard input: some 10 ms."""
MARK_AGAIN_S = 0.5
"""While cold pages come in, the resident ones are marked as used again: so often at most, and"""
MARK_AGAIN_FACTOR = 10.0
"""never for more than a tenth of the time."""
PROGRESS_S = 0.1
_RESIDENT_BIT = bytes(number & 1 for number in range(256))
"""Bit 0 of each byte is residency; macOS sets others as well (mincore(2); xnu, bsd/sys/mman.h: MINCORE_INCORE)."""
_PROT_READ, _PROT_EXEC, _MAP_SHARED = 1, 4, 1
"""The same on Linux and macOS (<sys/mman.h>)."""
_MAP_FAILED = ctypes.c_void_p(-1).value
_F_RDADVISE = 44
"""macOS: asynchronous read-ahead, struct radvisory { off_t ra_offset; int ra_count; } (xnu, bsd/sys/fcntl.h)."""
_EPERM, _ENOSYS = 1, 38

linux_os: Any = os
"""typeshed knows posix_fadvise on Linux only."""
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_longlong,
]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]
libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.munlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


class Refused(Exception):
    """A command cannot be done; `kind` is for programs, the text for people."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Mapping:
    """One file, mapped shared and read-only.

    Not by Python's mmap, which on macOS flushes the whole drive for each mapping (CPython issue 113861).
    """

    def __init__(self, path: str, *, checks_owner: bool, is_executable: bool) -> None:
        self.path = path
        self.is_executable = is_executable
        try:
            self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise Refused("unreadable", f"cannot open {path}: {error.strerror}") from error
        facts = os.fstat(self.descriptor)
        self.identity = identity(facts)
        self.size = facts.st_size
        self.pages = -(-self.size // PAGE_BYTES)
        self.is_told = not checks_owner or is_told(path, facts)
        self.address = 0
        try:
            self.map(facts)
        except Refused:
            os.close(self.descriptor)
            raise

    def map(self, facts: os.stat_result) -> None:
        """Map the whole file; an empty one has nothing to map."""
        if not stat.S_ISREG(facts.st_mode):
            raise Refused("unreadable", f"not a file: {self.path}")
        if self.size:
            # Linux gives used pages of an executable mapping one more round (mm/vmscan.c, shrink_active_list), and
            # takes others at their second look: 2.4 instead of 2.7 to 4.6 times a hot first token.
            address = self.map_with(_PROT_READ | _PROT_EXEC) if self.is_executable else None
            if address in {None, _MAP_FAILED}:
                address = self.map_with(_PROT_READ)  # a volume mounted noexec refuses the other
            if address in {None, _MAP_FAILED}:
                raise Refused("unreadable", f"cannot map {self.path}: {os.strerror(ctypes.get_errno())}")
            self.address = address

    def map_with(self, protection: int) -> int | None:
        """Call mmap(2)."""
        address: int | None = libc.mmap(None, self.size, protection, _MAP_SHARED, self.descriptor, 0)
        return address

    def is_current(self) -> bool:
        """Return True if the path still leads to the file that is mapped, unchanged."""
        try:
            return identity(os.stat(self.path)) == self.identity  # noqa: PTH116  # no pathlib here
        except OSError:
            return False

    def close(self) -> None:
        """Unmap and close."""
        if self.address:
            libc.munmap(self.address, self.size)
        os.close(self.descriptor)


def identity(facts: os.stat_result) -> tuple[int, int, int, int]:
    """Return what tells a file from its replacement."""
    return facts.st_dev, facts.st_ino, facts.st_size, facts.st_mtime_ns


def is_told(path: str, facts: os.stat_result) -> bool:
    """Return True if mincore answers truthfully.

    To who neither owns the file nor may write it, Linux says "resident" of every page (mincore(2), since 5.2).
    """
    return facts.st_uid == os.geteuid() or os.access(path, os.W_OK, effective_ids=True)


class Commands:
    """The lines that come in; while something is done only a stop and the end of input are obeyed."""

    def __init__(self) -> None:
        self.pending = b""
        self.waiting: list[Json] = []
        self.is_stopped = False

    def next(self) -> Json | None:
        """Return the next command, one that had to wait first; None at the end of input."""
        return self.waiting.pop(0) if self.waiting else self.read()

    def read(self) -> Json | None:
        """Return the next line's command; None at the end of input."""
        while b"\n" not in self.pending:
            data = os.read(0, 65536)
            if not data:
                return None
            self.pending += data
        line, self.pending = self.pending.split(b"\n", 1)
        command: Json = json.loads(line)
        return command

    def look_for_stop(self) -> None:
        """Read what has come without waiting; exits at the end of input."""
        while select.select([0], [], [], 0)[0]:
            command = self.read()
            if command is None:
                os._exit(0)
            if command["do"] == "stop":
                self.is_stopped = True
                say({"id": command["id"]})
            else:
                self.waiting.append(command)


class Residency:
    """What the kernel tells of the mappings' pages."""

    def __init__(self, cachestat: int | None) -> None:
        self.cachestat = cachestat
        self.vector = ctypes.create_string_buffer(BLOCK_BYTES // PAGE_BYTES)

    def source(self, mappings: list[Mapping]) -> str:
        """Return what will tell residency, or refuse: what cannot be trusted is unknown."""
        if all(each.is_told for each in mappings):
            return "mincore"
        mapping = next(each for each in mappings if not each.is_told)
        if self.cachestat is not None and mapping.size:
            try:
                self.cached_pages(mapping, 0, 1)
            except OSError as error:
                if error.errno not in {_EPERM, _ENOSYS}:
                    raise Refused("no_reading", f"cachestat: {error.strerror}") from error
            else:
                return "cachestat"
        raise Refused("not_owner", f"{mapping.path} belongs to another user, and may not be written")

    def cached_pages(self, mapping: Mapping, first: int, last: int) -> int:
        """Count cached pages with cachestat (Linux 6.5, <linux/mman.h>: two u64 asked, five answered)."""
        wanted = struct.pack("QQ", first * PAGE_BYTES, (last - first) * PAGE_BYTES)
        told = ctypes.create_string_buffer(40)
        if libc.syscall(self.cachestat, mapping.descriptor, wanted, told, 0) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
        cached: int = struct.unpack_from("Q", told.raw)[0]
        return cached

    def bits(self, mapping: Mapping, first: int, last: int) -> bytes:
        """Return a byte for each page: 1 if it is resident."""
        if libc.mincore(mapping.address + first * PAGE_BYTES, (last - first) * PAGE_BYTES, self.vector) != 0:
            raise Refused("no_reading", f"mincore: {os.strerror(ctypes.get_errno())}")
        return self.vector.raw[: last - first].translate(_RESIDENT_BIT)

    def is_resident(self, mapping: Mapping, page: int) -> int:
        """Return the bit of one page; bits() would copy the whole vector."""
        if libc.mincore(mapping.address + page * PAGE_BYTES, PAGE_BYTES, self.vector) != 0:
            raise Refused("no_reading", f"mincore: {os.strerror(ctypes.get_errno())}")
        return self.vector[0][0] & 1

    def count(self, mappings: list[Mapping], stretches: list[Stretch]) -> Json:
        """Count the resident pages of each stretch."""
        source = self.source(mappings)
        if source == "cachestat":
            counts = [self.cached_pages(*each) if each[2] > each[1] else 0 for each in stretches]
        else:
            counts = self.count_by_mincore(mappings, stretches)
        totals = [last - first for _, first, last in stretches]
        return {"source": source, "page_bytes": PAGE_BYTES, "counts": list(zip(counts, totals, strict=True))}

    def count_by_mincore(self, mappings: list[Mapping], stretches: list[Stretch]) -> list[int]:
        """Count in one walk over the files; stretches may overlap."""
        counts = [0] * len(stretches)
        for mapping in mappings:
            mine = sorted(
                (first, last, number)
                for number, (owner, first, last) in enumerate(stretches)
                if owner is mapping and last > first
            )
            for begin in range(0, mapping.pages, len(self.vector)):
                end = min(begin + len(self.vector), mapping.pages)
                here = [each for each in mine if each[0] < end and each[1] > begin]
                mine = [each for each in mine if each[1] > begin]
                if not here:
                    continue
                bits = self.bits(mapping, begin, end)
                for first, last, number in here:
                    counts[number] += bits.count(1, max(first - begin, 0), min(last, end) - begin)
        return counts

    def sample(self, mappings: list[Mapping], wanted: int) -> Json:
        """Look at one page in each of `wanted` equal stretches, chosen at random."""
        source = self.source(mappings)
        total = sum(each.pages for each in mappings)
        wanted = min(wanted, total)
        chances = struct.unpack(f"={wanted}I", os.urandom(4 * wanted))
        resident = begin = 0
        left = iter(mappings)
        mapping = None
        for number, chance in enumerate(chances):
            low, high = number * total // wanted, (number + 1) * total // wanted
            page = low + (chance * (high - low) >> 32)
            while mapping is None or page >= begin + mapping.pages:
                begin += mapping.pages if mapping is not None else 0
                mapping = next(left)
            if source == "cachestat":
                resident += self.cached_pages(mapping, page - begin, page - begin + 1)
            else:
                resident += self.is_resident(mapping, page - begin)
        return {"source": source, "resident": resident, "sampled": wanted, "total": total, "page_bytes": PAGE_BYTES}

    def look(self, mappings: list[Mapping], stretches: list[Stretch], most: int) -> Json:
        """Count the resident pages among `most` evenly spaced ones of each stretch: the same ones each time."""
        source = self.source(mappings)
        counts = []
        for mapping, first, last in stretches:
            total = last - first
            pages = [first + (2 * step + 1) * total // (2 * most) for step in range(most)] if total > most else []
            resident = 0
            for page in pages or range(first, last):
                if source == "cachestat":
                    resident += self.cached_pages(mapping, page, page + 1)
                else:
                    resident += self.is_resident(mapping, page)
            counts.append((resident, min(total, most)))
        return {"source": source, "page_bytes": PAGE_BYTES, "counts": counts}

    def runs(self, mapping: Mapping, first: int, last: int, *, bit: int) -> Iterator[tuple[int, int]]:
        """Yield first and last page (exclusive) of each run of resident pages (`bit` 1) or cold ones (0)."""
        for begin in range(first, last, len(self.vector)):
            end = min(begin + len(self.vector), last)
            bits = self.bits(mapping, begin, end) if mapping.is_told else bytes(end - begin)
            page = bits.find(bit)
            while page >= 0:
                stop = bits.find(1 - bit, page)
                stop = len(bits) if stop < 0 else stop
                yield begin + page, begin + stop
                page = bits.find(bit, stop)


class Toucher:
    """Keeps the mappings and carries out the commands."""

    def __init__(self, paging: Json) -> None:
        self.populate = paging["populate"]
        self.checks_owner = paging["checks_owner"]
        self.touches_twice = paging["touches_twice"]
        self.keeps_executable = paging["keeps_executable"]
        self.paths: list[str] = []
        self.mappings: list[Mapping] = []
        self.step_bytes = FIRST_STEP_BYTES
        self.residency = Residency(paging["cachestat"])
        self.commands = Commands()

    # --- lines ----------------------------------------------------------------------------------------------

    def serve(self) -> None:
        """Carry out commands until the end of input."""
        while (command := self.commands.next()) is not None:
            self.answer(command)

    def answer(self, command: Json) -> None:
        """Carry out a command and write its answer."""
        number = command["id"]
        try:
            result = self.obey(command)
        except Refused as refusal:
            result = {"error": refusal.kind, "message": str(refusal)}
        say({"id": number, **result})

    def obey(self, command: Json) -> Json:
        """Carry out a command and return its answer."""
        verb = command["do"]
        if verb == "map":
            return self.map(command["paths"])
        if verb == "stop":
            return {}  # nothing is being touched
        self.refresh()
        number, spans = command["id"], command.get("spans")
        work = {
            "count": lambda: self.residency.count(self.mappings, self.stretches(spans)),
            "sample": lambda: self.residency.sample(self.one_or_all(command.get("file")), command["pages"]),
            "look": lambda: self.residency.look(self.mappings, self.stretches(spans), command["pages"]),
            "touch": lambda: self.touch(number, spans),
            "lock": lambda: self.lock(number),
            "unlock": self.unlock,
        }.get(verb)
        if work is None:
            raise Refused("usage", f"no such command: {verb}")
        return work()

    # --- mappings -------------------------------------------------------------------------------------------

    def map(self, paths: list[str]) -> Json:
        """Map these files instead of what was mapped."""
        self.paths = paths
        self.release()
        for path in paths:
            self.mappings.append(Mapping(path, checks_owner=self.checks_owner, is_executable=self.keeps_executable))
        return {
            "page_bytes": PAGE_BYTES,
            "files": [{"bytes": each.size, "pages": each.pages} for each in self.mappings],
        }

    def release(self) -> None:
        """Unmap everything."""
        while self.mappings:
            self.mappings.pop().close()

    def refresh(self) -> None:
        """Map again what was replaced, grown, shortened or missing."""
        if not self.paths:
            raise Refused("usage", "no file was named")
        if len(self.mappings) < len(self.paths) or not all(each.is_current() for each in self.mappings):
            self.map(self.paths)

    def one_or_all(self, number: int | None) -> list[Mapping]:
        """Return the mapping of a file, or all of them."""
        return self.mappings if number is None else self.mappings[number : number + 1]

    def whole(self) -> list[Span]:
        """Return a span for each file."""
        return [(number, 0, each.size) for number, each in enumerate(self.mappings)]

    def stretches(self, spans: list[Span] | None) -> list[Stretch]:
        """Return mapping, first and last page (exclusive) of each span, cut to the file."""
        cut = []
        for number, offset, length in spans or self.whole():
            mapping = self.mappings[number]
            end = min(offset + length, mapping.size)
            first = min(offset // PAGE_BYTES, mapping.pages)
            cut.append((mapping, first, max(-(-end // PAGE_BYTES), first) if end > offset else first))
        return cut

    # --- touching -------------------------------------------------------------------------------------------

    def touch(self, number: int, spans: list[Span] | None) -> Json:
        """Load a byte of each page: of the resident ones first, then of the cold ones, with read-ahead."""
        began_s = said_s = time.perf_counter()
        stretches = self.stretches(spans)
        total = sum(last - first for _, first, last in stretches)
        self.commands.is_stopped = False
        done = cold = 0
        for loaded, was_cold in self.load(stretches):
            # What is taken during the pass is loaded again by it.
            done = min(done + loaded, total)
            cold += was_cold
            now_s = time.perf_counter()
            if now_s - said_s >= PROGRESS_S:
                said_s = now_s
                say({"id": number, "progress": [done * PAGE_BYTES, total * PAGE_BYTES]})
            self.commands.look_for_stop()
            if self.commands.is_stopped:
                break
        if cold and self.touches_twice and not self.commands.is_stopped:
            self.load_again(stretches)
        is_cold_told = all(each.is_told for each in self.mappings)
        return {
            "is_complete": not self.commands.is_stopped,
            "done_bytes": done * PAGE_BYTES,
            "total_bytes": total * PAGE_BYTES,
            "cold_bytes": cold * PAGE_BYTES if is_cold_told else None,
            "elapsed_s": time.perf_counter() - began_s,
        }

    # --- locking --------------------------------------------------------------------------------------------

    def lock(self, number: int) -> Json:
        """Touch everything, then lock it (mlock(2)); what was locked before an error or a stop stays locked."""
        result = self.touch(number, None)
        locked = 0
        error = None
        for mapping in self.mappings:
            for begin in range(0, mapping.size, LOCK_STEP_BYTES):
                self.commands.look_for_stop()
                if self.commands.is_stopped or error is not None:
                    break
                length = min(LOCK_STEP_BYTES, mapping.size - begin)
                if libc.mlock(mapping.address + begin, length) == 0:
                    locked += length
                else:
                    error = os.strerror(ctypes.get_errno())
        complete = result["is_complete"] and error is None and not self.commands.is_stopped
        return {**result, "is_complete": complete, "locked_bytes": locked, "lock_error": error}

    def unlock(self) -> Json:
        """Let go of every lock; the pages stay until the system wants them."""
        for mapping in self.mappings:
            if mapping.size:
                libc.munlock(mapping.address, mapping.size)
        return {}

    # --- cold pages -----------------------------------------------------------------------------------------

    def load(self, stretches: list[Stretch]) -> Iterator[tuple[int, int]]:
        """Yield after each step: pages loaded, and how many of them were cold.

        What is resident is marked as used before the disk is asked for anything, and again while it is asked. Under
        pressure each page that comes in makes another one leave; in file order that was the one to be read next:
        a pass that found 9 % of 2 GiB gone had to read 74 % of it.
        """
        marked_s, took_s = yield from self.load_resident(stretches)
        for mapping, first, last in stretches:
            for pages in self.load_gaps(mapping, first, last):
                yield pages, pages if mapping.is_told else 0
                if time.perf_counter() - marked_s > max(MARK_AGAIN_S, MARK_AGAIN_FACTOR * took_s):
                    marked_s, took_s = yield from self.load_resident(stretches, is_first=False)

    def load_resident(
        self, stretches: list[Stretch], *, is_first: bool = True
    ) -> Generator[tuple[int, int], None, tuple[float, float]]:
        """Load the resident pages step by step; return when that ended and how long it took, in seconds.

        Where mincore does not tell the truth none passes for resident: asking the disk for what is there already
        costs little.
        """
        began_s = time.perf_counter()
        for mapping, first, last in stretches:
            for page, stop in self.residency.runs(mapping, first, last, bit=1):
                for step in range(page, stop, RESIDENT_STEP_BYTES // PAGE_BYTES):
                    end = min(step + RESIDENT_STEP_BYTES // PAGE_BYTES, stop)
                    load_pages(mapping, step, end)
                    yield end - step if is_first else 0, 0
        ended_s = time.perf_counter()
        return ended_s, ended_s - began_s

    def load_gaps(self, mapping: Mapping, first: int, last: int) -> Iterator[int]:
        """Load the cold pages in order, step by step; yield how many there were in each."""
        asked, block = first, len(self.residency.vector)
        for begin, stop in self.residency.runs(mapping, first, last, bit=0):
            block_end = min(first + ((begin - first) // block + 1) * block, last)
            page = begin
            while page < stop:
                end = min(page + self.step_bytes // PAGE_BYTES, stop)
                asked = self.read_ahead(mapping, max(asked, page), end, block_end)
                self.load_cold(mapping, page, end)
                yield end - page
                page = end

    def load_cold(self, mapping: Mapping, page: int, stop: int) -> None:
        """Fault pages in and load them; the time it takes sets the length of the next step."""
        began_s = time.perf_counter()
        if self.populate is not None:
            # Synchronous, and fails on kernels before 5.14; then the loads fault the pages in one by one.
            libc.madvise(mapping.address + page * PAGE_BYTES, (stop - page) * PAGE_BYTES, self.populate)
        load_pages(mapping, page, stop)
        took_s = time.perf_counter() - began_s
        if took_s > LONG_STEP_S:
            self.step_bytes = max(self.step_bytes // 2, LEAST_STEP_BYTES, PAGE_BYTES)
        elif took_s < SHORT_STEP_S:
            self.step_bytes = min(self.step_bytes * 2, MOST_STEP_BYTES)

    def read_ahead(self, mapping: Mapping, asked: int, stop: int, last: int) -> int:
        """Ask the disk for what comes next; return the page up to which it has been asked."""
        wanted = min(stop + READ_AHEAD_BYTES // PAGE_BYTES, last)
        piece = READ_AHEAD_PIECE_BYTES // PAGE_BYTES
        while asked < wanted:
            ask_disk(mapping.descriptor, asked * PAGE_BYTES, min(piece, last - asked) * PAGE_BYTES)
            asked = min(asked + piece, last)
        return asked

    def load_again(self, stretches: list[Stretch]) -> None:
        """Load what is resident once more.

        macOS deactivates the pages behind a sequential run of faults (xnu, osfmk/vm/vm_fault.c); on pages that are
        mapped already, plain loads only mark them as used.
        """
        for mapping, first, last in stretches:
            for begin in range(first, last, RESIDENT_STEP_BYTES // PAGE_BYTES):
                end = min(begin + RESIDENT_STEP_BYTES // PAGE_BYTES, last)
                if not mapping.is_told or 0 not in self.residency.bits(mapping, begin, end):
                    load_pages(mapping, begin, end)
                self.commands.look_for_stop()
                if self.commands.is_stopped:
                    return


def load_pages(mapping: Mapping, first: int, last: int) -> None:
    """Load a byte of each page: a slice with a step is a loop in C, some 10 to 20 ns a page."""
    length = (last - first) * PAGE_BYTES
    (ctypes.c_char * length).from_address(mapping.address + first * PAGE_BYTES)[0:length:PAGE_BYTES]


def ask_disk(descriptor: int, offset: int, length: int) -> None:
    """Ask for read-ahead without waiting: posix_fadvise(2) where there is one, else macOS's F_RDADVISE."""
    try:
        if hasattr(os, "posix_fadvise"):
            linux_os.posix_fadvise(descriptor, offset, length, linux_os.POSIX_FADV_WILLNEED)
        else:
            fcntl.fcntl(descriptor, _F_RDADVISE, struct.pack("qi4x", offset, length))
    except OSError:
        pass  # it was advice; the loads bring the pages in


def say(content: Json) -> None:
    """Write a line."""
    try:
        sys.stdout.write(json.dumps(content) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        os._exit(0)  # the daemon has gone


if __name__ == "__main__":
    # Death by SIGBUS is foreseen: no core file.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    Toucher(json.loads(sys.argv[1])).serve()
