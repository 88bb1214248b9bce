"""The system calls that a sandboxed program may make, as a seccomp filter in classic BPF for prctl(PR_SET_SECCOMP).

A list of what is allowed: a call that Linux adds tomorrow is denied. There is no fork, exec, socket, signal to another
process, mount, ptrace, shared memory, change of owners, modes or times, and no clone but of threads. What is left reads
and writes open files, opens what the file system shows, and manages the program's own memory, threads and clocks.
Denied calls fail with ENOSYS, so that libc and Python fall back to others.
"""

from __future__ import annotations

import errno
import platform
import struct
from collections.abc import Iterator
from typing import NamedTuple

# Numbers from asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64); - where an architecture has no such call.
ALLOWED = """
read 0 63  write 1 64  close 3 57  lseek 8 62  pread64 17 67  pwrite64 18 68  readv 19 65  writev 20 66
mmap 9 222  mprotect 10 226  munmap 11 215  mremap 25 216  madvise 28 233  brk 12 214  mincore 27 232
futex 202 98  futex_waitv 449 449  set_robust_list 273 99  get_robust_list 274 100  rseq 334 293
rt_sigaction 13 134  rt_sigprocmask 14 135  rt_sigreturn 15 139  rt_sigtimedwait 128 137  sigaltstack 131 132
restart_syscall 219 128  set_tid_address 218 96  arch_prctl 158 -
fstat 5 80  newfstatat 262 79  statx 332 291  stat 4 -  lstat 6 -  open 2 -  openat 257 56  openat2 437 437
access 21 -  faccessat 269 48  faccessat2 439 439  readlink 89 -  readlinkat 267 78  getcwd 79 17
getdents 78 -  getdents64 217 61  chdir 80 49  fchdir 81 50  umask 95 166
dup 32 23  dup2 33 -  dup3 292 24  pipe 22 -  pipe2 293 59  poll 7 -  ppoll 271 73  select 23 -  pselect6 270 72
epoll_create 213 -  epoll_create1 291 20  epoll_ctl 233 21  epoll_wait 232 -  epoll_pwait 281 22  eventfd2 290 19
gettid 186 178  getpid 39 172  getppid 110 173  getpgid 121 155  getpgrp 111 -  getsid 124 156
getuid 102 174  geteuid 107 175  getgid 104 176  getegid 108 177  getgroups 115 158
getresuid 118 148  getresgid 120 150
clock_gettime 228 113  clock_getres 229 114  clock_nanosleep 230 115  nanosleep 35 101  gettimeofday 96 169
time 201 -  times 100 153  setitimer 38 103  getitimer 36 102  alarm 37 -  pause 34 -
getrusage 98 165  getrlimit 97 163  sysinfo 99 179  uname 63 160  sched_yield 24 124  sched_getaffinity 204 123
getrandom 318 278  exit 60 93  exit_group 231 94  wait4 61 260  waitid 247 95
sendto 44 206  recvfrom 45 207  sendmsg 46 211  recvmsg 47 212  shutdown 48 210
getsockopt 55 209  setsockopt 54 208  getsockname 51 204  getpeername 52 205
"""


class Restricted(NamedTuple):
    """A call that is allowed where an argument is one of `values`, or, with `flag`, where it has that bit set."""

    numbers: tuple[int, int]
    argument: int
    values: tuple[int, ...] = ()
    flag: int = 0


RESTRICTED = {
    "clone": Restricted((56, 220), 0, flag=0x10000),  # CLONE_THREAD
    "fcntl": Restricted((72, 25), 1, (0, 1, 2, 3, 4, 1030)),  # descriptors and their flags; no locks, owners, leases
    "ioctl": Restricted((16, 29), 1, (0x5401, 0x5421, 0x541B, 0x5450, 0x5451)),  # isatty, FIO*, close-on-exec
    "prlimit64": Restricted((302, 261), 0, (0,)),  # of itself
    "socketpair": Restricted((53, 199), 0, (1,)),  # AF_UNIX, for asyncio: there is nobody to connect to
}
ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
"""AUDIT_ARCH_* by platform.machine(), in the order of the numbers above."""

KILL_PROCESS, ALLOW, ERROR = 0x80000000, 0x7FFF0000, 0x00050000
NUMBER_AT, ARCHITECTURE_AT, ARGUMENTS_AT = 0, 4, 16
"""Offsets in struct seccomp_data. Of arguments, the low words are read: the kernel ignores the high ones of these."""
LOAD, IF_EQUAL, IF_ANY_BIT, RETURN = 0x20, 0x15, 0x45, 0x06
"""Opcodes of BPF."""


def filter_of(machine: str | None = None) -> bytes:
    """The filter for this machine's architecture: instructions of 8 bytes.

    Raises:
        NotImplementedError: an architecture whose numbers of system calls are not here.
    """
    machine = machine or platform.machine()
    if machine not in ARCHITECTURES:
        raise NotImplementedError(f"no numbers of system calls for {machine}, only for {' and '.join(ARCHITECTURES)}")
    column = list(ARCHITECTURES).index(machine)
    return b"".join(struct.pack("HBBI", *instruction) for instruction in _instructions(column, ARCHITECTURES[machine]))


def numbers() -> dict[str, tuple[int | None, ...]]:
    """Every call of ALLOWED with its number on each architecture."""
    words = ALLOWED.split()
    table = zip(words[::3], words[1::3], words[2::3], strict=True)
    return {name: tuple(None if n == "-" else int(n) for n in both) for name, *both in table}


def _instructions(column: int, architecture: int) -> Iterator[tuple[int, int, int, int]]:
    """(opcode, jump if true, jump if false, operand)."""
    yield LOAD, 0, 0, ARCHITECTURE_AT
    yield IF_EQUAL, 1, 0, architecture
    yield RETURN, 0, 0, KILL_PROCESS
    yield LOAD, 0, 0, NUMBER_AT
    for both in numbers().values():
        if (number := both[column]) is not None:
            yield IF_EQUAL, 0, 1, number
            yield RETURN, 0, 0, ALLOW
    for call in RESTRICTED.values():
        tests = [(IF_EQUAL, value) for value in call.values] or [(IF_ANY_BIT, call.flag)]
        yield IF_EQUAL, 0, 2 * len(tests) + 2, call.numbers[column]
        yield LOAD, 0, 0, ARGUMENTS_AT + 8 * call.argument
        for opcode, operand in tests:
            yield opcode, 0, 1, operand
            yield RETURN, 0, 0, ALLOW
        yield RETURN, 0, 0, ERROR | errno.EPERM
    yield RETURN, 0, 0, ERROR | errno.ENOSYS
