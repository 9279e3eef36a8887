"""The calls of macOS that no Python library offers, through ctypes: structures, prototypes and their sources.

Whatever fails here is None: unknown. No errno leaves this module. All functions have a fixed list of arguments; a
variadic one must not be called like this on Apple silicon, where variadic arguments are passed differently (Apple,
"Writing ARM64 code for Apple platforms").
"""

from __future__ import annotations

import ctypes
import os
from ctypes import (
    c_char,
    c_char_p,
    c_int,
    c_int32,
    c_int64,
    c_size_t,
    c_uint8,
    c_uint16,
    c_uint32,
    c_uint64,
    c_void_p,
)
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

_RUSAGE_INFO_V4 = 4
"""RUSAGE_INFO_V4 (xnu, bsd/sys/resource.h)."""
_HOST_VM_INFO64 = 4
"""HOST_VM_INFO64 (xnu, osfmk/mach/host_info.h)."""
_KERN_SUCCESS = 0
"""KERN_SUCCESS (xnu, osfmk/mach/kern_return.h)."""
_MIG_ARRAY_TOO_LARGE = -307
"""MIG_ARRAY_TOO_LARGE (xnu, osfmk/mach/mig_errors.h): the answer is longer than the count that was passed, which
then holds the length."""
_HOST_INFO_INTS_MOST = 256
"""Most of a host_info64_t: array[*:256] of integer_t (xnu, osfmk/mach/mach_types.defs)."""
_NUMBER_BYTES = (4, 8)
"""A sysctl's number is as wide as the kernel says (xnu, bsd/sys/sysctl.h, above the HW_ names)."""


class RusageInfoV4(ctypes.Structure):
    """struct rusage_info_v4, 296 bytes, the same since macOS 10.14 (xnu, bsd/sys/resource.h).

    Times are ticks of mach_absolute_time, sizes are bytes, ri_pageins counts faults that read from a disk.
    """

    _fields_ = (
        ("ri_uuid", c_uint8 * 16),
        ("ri_user_time", c_uint64),
        ("ri_system_time", c_uint64),
        ("ri_pkg_idle_wkups", c_uint64),
        ("ri_interrupt_wkups", c_uint64),
        ("ri_pageins", c_uint64),
        ("ri_wired_size", c_uint64),
        ("ri_resident_size", c_uint64),
        ("ri_phys_footprint", c_uint64),
        ("ri_proc_start_abstime", c_uint64),
        ("ri_proc_exit_abstime", c_uint64),
        ("ri_child_user_time", c_uint64),
        ("ri_child_system_time", c_uint64),
        ("ri_child_pkg_idle_wkups", c_uint64),
        ("ri_child_interrupt_wkups", c_uint64),
        ("ri_child_pageins", c_uint64),
        ("ri_child_elapsed_abstime", c_uint64),
        ("ri_diskio_bytesread", c_uint64),
        ("ri_diskio_byteswritten", c_uint64),
        ("ri_cpu_time_qos_default", c_uint64),
        ("ri_cpu_time_qos_maintenance", c_uint64),
        ("ri_cpu_time_qos_background", c_uint64),
        ("ri_cpu_time_qos_utility", c_uint64),
        ("ri_cpu_time_qos_legacy", c_uint64),
        ("ri_cpu_time_qos_user_initiated", c_uint64),
        ("ri_cpu_time_qos_user_interactive", c_uint64),
        ("ri_billed_system_time", c_uint64),
        ("ri_serviced_system_time", c_uint64),
        ("ri_logical_writes", c_uint64),
        ("ri_lifetime_max_phys_footprint", c_uint64),
        ("ri_instructions", c_uint64),
        ("ri_cycles", c_uint64),
        ("ri_billed_energy", c_uint64),
        ("ri_serviced_energy", c_uint64),
        ("ri_interval_max_phys_footprint", c_uint64),
        ("ri_runnable_time", c_uint64),
    )


class VmStatistics64(ctypes.Structure):
    """The first 152 bytes of struct vm_statistics64, which newer systems only append to.

    xnu, osfmk/mach/vm_statistics.h. Everything counts pages of the kernel's size; free_count has the speculative
    pages in it; swapins and swapouts too are pages: what came from and went to swap files, by PAGE_SHIFT
    (xnu, osfmk/vm/vm_compressor_backing_store.c).
    """

    _fields_ = (
        ("free_count", c_uint32),
        ("active_count", c_uint32),
        ("inactive_count", c_uint32),
        ("wire_count", c_uint32),
        ("zero_fill_count", c_uint64),
        ("reactivations", c_uint64),
        ("pageins", c_uint64),
        ("pageouts", c_uint64),
        ("faults", c_uint64),
        ("cow_faults", c_uint64),
        ("lookups", c_uint64),
        ("hits", c_uint64),
        ("purges", c_uint64),
        ("purgeable_count", c_uint32),
        ("speculative_count", c_uint32),
        ("decompressions", c_uint64),
        ("compressions", c_uint64),
        ("swapins", c_uint64),
        ("swapouts", c_uint64),
        ("compressor_page_count", c_uint32),
        ("throttled_count", c_uint32),
        ("external_page_count", c_uint32),
        ("internal_page_count", c_uint32),
        ("total_uncompressed_pages_in_compressor", c_uint64),
    )


class XswUsage(ctypes.Structure):
    """struct xsw_usage of vm.swapusage, 32 bytes; sizes are bytes (xnu, bsd/sys/sysctl.h)."""

    _fields_ = (
        ("xsu_total", c_uint64),
        ("xsu_avail", c_uint64),
        ("xsu_used", c_uint64),
        ("xsu_pagesize", c_uint32),
        ("xsu_encrypted", c_int),
    )


class ProcRegionInfo(ctypes.Structure):
    """struct proc_regioninfo, 96 bytes (xnu, bsd/sys/proc_info.h)."""

    _fields_ = (
        ("pri_protection", c_uint32),
        ("pri_max_protection", c_uint32),
        ("pri_inheritance", c_uint32),
        ("pri_flags", c_uint32),
        ("pri_offset", c_uint64),
        ("pri_behavior", c_uint32),
        ("pri_user_wired_count", c_uint32),
        ("pri_user_tag", c_uint32),
        ("pri_pages_resident", c_uint32),
        ("pri_pages_shared_now_private", c_uint32),
        ("pri_pages_swapped_out", c_uint32),
        ("pri_pages_dirtied", c_uint32),
        ("pri_ref_count", c_uint32),
        ("pri_shadow_depth", c_uint32),
        ("pri_share_mode", c_uint32),
        ("pri_private_pages_resident", c_uint32),
        ("pri_shared_pages_resident", c_uint32),
        ("pri_obj_id", c_uint32),
        ("pri_depth", c_uint32),
        ("pri_address", c_uint64),
        ("pri_size", c_uint64),
    )


class VinfoStat(ctypes.Structure):
    """struct vinfo_stat, 136 bytes (same file)."""

    _fields_ = (
        ("vst_dev", c_uint32),
        ("vst_mode", c_uint16),
        ("vst_nlink", c_uint16),
        ("vst_ino", c_uint64),
        ("vst_uid", c_uint32),
        ("vst_gid", c_uint32),
        ("vst_atime", c_int64),
        ("vst_atimensec", c_int64),
        ("vst_mtime", c_int64),
        ("vst_mtimensec", c_int64),
        ("vst_ctime", c_int64),
        ("vst_ctimensec", c_int64),
        ("vst_birthtime", c_int64),
        ("vst_birthtimensec", c_int64),
        ("vst_size", c_int64),
        ("vst_blocks", c_int64),
        ("vst_blksize", c_int32),
        ("vst_flags", c_uint32),
        ("vst_gen", c_uint32),
        ("vst_rdev", c_uint32),
        ("vst_qspare", c_int64 * 2),
    )


class ProcRegionWithPathInfo(ctypes.Structure):
    """struct proc_regionwithpathinfo, 1272 bytes; a path has at most MAXPATHLEN bytes (same file)."""

    _fields_ = (
        ("prp_prinfo", ProcRegionInfo),
        ("vi_stat", VinfoStat),
        ("vi_type", c_int),
        ("vi_pad", c_int),
        ("vi_fsid", c_int32 * 2),
        ("vip_path", c_char * 1024),
    )


_PROC_PIDREGIONPATHINFO2 = 22
"""The next region, from an address on, that maps a file (xnu, bsd/sys/proc_info.h, bsd/kern/proc_info.c)."""
_MOST_REGIONS = 65_536
_VM_INFO_INTS = ctypes.sizeof(VmStatistics64) // ctypes.sizeof(c_int)
"""HOST_VM_INFO64_REV1_COUNT, 38: what the kernel fills since OS X 10.9 (xnu, osfmk/mach/host_info.h)."""
_VM_INFO_TRIES = 2
"""One that may be refused, one with the length that the kernel named."""


class DarwinCalls:
    """Calls of libSystem.

    A function that the library lacks makes its reading unknown, as a failing one does.

    Args:
        library: has the functions; None for those of this process, where macOS has libSystem.
    """

    def __init__(self, library: ctypes.CDLL | None = None) -> None:
        self.library = ctypes.CDLL(None) if library is None else library
        # xnu, libsyscall/wrappers/libproc/libproc.h: pid, flavor, and the address of the structure, although the
        # type of the argument is a pointer to a pointer.
        self._proc_pid_rusage = self._function("proc_pid_rusage", c_int, [c_int, c_int, c_void_p])
        # The same header: pid, flavor, argument, buffer and its size.
        self._proc_pidinfo = self._function("proc_pidinfo", c_int, [c_int, c_int, c_uint64, c_void_p, c_int])
        # sysctl(3): name, old value and its length, new value and its length.
        self._sysctlbyname = self._function(
            "sysctlbyname", c_int, [c_char_p, c_void_p, ctypes.POINTER(c_size_t), c_void_p, c_size_t]
        )
        # xnu, libsyscall/mach/mach/mach_init.h and osfmk/mach/mach_host.defs; a mach_port_t is 32 bits.
        self._mach_host_self = self._function("mach_host_self", c_uint32, [])
        self._host_statistics64 = self._function(
            "host_statistics64", c_int, [c_uint32, c_int, ctypes.POINTER(c_int), ctypes.POINTER(c_uint32)]
        )
        # getxattr(2): path, name, value, size, position, options. The one of Linux lacks the last two.
        self._getxattr = self._function(
            "getxattr", ctypes.c_ssize_t, [c_char_p, c_char_p, c_void_p, c_size_t, c_uint32, c_int]
        )
        self._host_port: int | None = None
        self._vm_info_ints = _VM_INFO_INTS

    def _function(self, name: str, result: Any, arguments: Sequence[Any]) -> Callable[..., Any] | None:
        function = getattr(self.library, name, None)
        if function is not None:
            function.restype = result
            function.argtypes = arguments
        return function

    def process_usage(self, pid: int) -> RusageInfoV4 | None:
        """Return what the kernel counts of a process; its sizes are bytes.

        None for a process that is gone (ESRCH) or of another user (EPERM), unless this one is root's
        (proc_pid_rusage in xnu, bsd/kern/proc_info.c).
        """
        usage = RusageInfoV4()
        if self._proc_pid_rusage is None or self._proc_pid_rusage(pid, _RUSAGE_INFO_V4, ctypes.byref(usage)) != 0:
            return None
        return usage

    def mapped_regions(self, pid: int) -> list[ProcRegionWithPathInfo]:
        """Return the regions of a process that map files, none if it may not be asked.

        The kernel counts no resident pages in this answer (fill_procregioninfo_onlymappedvnodes in xnu,
        osfmk/vm/bsd_vm.c), but it tells how often a region was locked. It ends with EINVAL.
        """
        found, address = list[ProcRegionWithPathInfo](), 0
        while self._proc_pidinfo is not None and len(found) < _MOST_REGIONS:
            region = ProcRegionWithPathInfo()
            size = ctypes.sizeof(region)
            if self._proc_pidinfo(pid, _PROC_PIDREGIONPATHINFO2, address, ctypes.byref(region), size) != size:
                break
            end = region.prp_prinfo.pri_address + region.prp_prinfo.pri_size
            if end <= address:
                break
            found.append(region)
            address = end
        return found

    def vm_statistics(self) -> VmStatistics64 | None:
        """Return the system's page counters, None if the kernel does not tell.

        The kernel answers a program of a third party 2 to 10 times in a second, and repeats itself after that
        (rate_limit_host_statistics in xnu, osfmk/kern/host.c). Newer systems count more than 38 integers and refuse
        too short a buffer, but not always: then the length they name is used, and remembered.
        """
        if self._host_statistics64 is None or (host := self._host()) is None:
            return None
        asked_ints = self._vm_info_ints
        for _ in range(_VM_INFO_TRIES):
            info = (c_int * _HOST_INFO_INTS_MOST)()
            count = c_uint32(asked_ints)
            answer = self._host_statistics64(host, _HOST_VM_INFO64, info, ctypes.byref(count))
            if answer == _KERN_SUCCESS and count.value >= _VM_INFO_INTS:
                self._vm_info_ints = asked_ints
                return VmStatistics64.from_buffer_copy(info)
            if answer != _MIG_ARRAY_TOO_LARGE or not asked_ints < count.value <= _HOST_INFO_INTS_MOST:
                return None
            asked_ints = count.value
        return None

    def _host(self) -> int | None:
        # Each call adds a reference to the port, which nothing would release: one call for the life of this object.
        if self._host_port is None and self._mach_host_self is not None:
            self._host_port = int(self._mach_host_self())
        return self._host_port

    def number(self, name: str) -> int | None:
        """Return an unsigned number by sysctlbyname(3), 4 or 8 bytes wide; None if there is none of that name."""
        value = self.value(name, max(_NUMBER_BYTES))
        return int.from_bytes(value, "little") if value is not None and len(value) in _NUMBER_BYTES else None

    def swap_usage(self) -> XswUsage | None:
        """Return vm.swapusage (xnu, bsd/kern/kern_sysctl.c), None if it cannot be told."""
        value = self.value("vm.swapusage", ctypes.sizeof(XswUsage))
        if value is None or len(value) != ctypes.sizeof(XswUsage):
            return None
        return XswUsage.from_buffer_copy(value)

    def value(self, name: str, most_bytes: int) -> bytes | None:
        """Return what sysctlbyname(3) has of that name; None if there is nothing, or more than `most_bytes`."""
        if self._sysctlbyname is None:
            return None
        value = ctypes.create_string_buffer(most_bytes)
        length = c_size_t(most_bytes)
        if self._sysctlbyname(name.encode(), value, ctypes.byref(length), None, 0) != 0:
            return None
        return value.raw[: length.value]

    def extended_attribute(self, path: Path, name: str) -> bytes | None:
        """Return an extended attribute of a file; symbolic links are followed (getxattr(2)).

        None if it has none of that name (ENOATTR), or the file cannot be read.
        """
        if self._getxattr is None:
            return None
        file, attribute = os.fsencode(path), name.encode()
        length = self._getxattr(file, attribute, None, 0, 0, 0)
        if length < 0:
            return None
        value = ctypes.create_string_buffer(max(length, 1))
        # It can have changed since: longer is refused (ERANGE), shorter is cut here.
        length = self._getxattr(file, attribute, value, length, 0, 0)
        return value.raw[:length] if length >= 0 else None
