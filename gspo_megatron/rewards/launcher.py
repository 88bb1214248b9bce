"""Runs inside a sandbox, before the program: limits and locks its own process, then becomes the program.

`sandbox.py` passes this file's text to `python -c`, so that no file has to be visible. It imports little: it runs for
every program. Standard input starts with the length of a task (8 bytes) and the task, a Python literal:

    limits     {number of a resource: (soft limit, hard limit)}
    readable   [(path, rights)] for Landlock, or None
    user       the uid and gid to change to, or None
    filter     the seccomp filter, or b""
    parent     its process id, where it can be seen, or None
    path       folders of packages
    program    the source
    calls      [(function, arguments) or an expression], or None: run as a script, which gets the rest of standard input

READY on standard output says that everything holds; what comes before or instead is the sandbox's fault, what comes
after it the program's. A script's output follows; or, for each call, a line of JSON: [result], of an expression its
repr(), or {"error": its name}.
"""

import ctypes
import os
import resource
import struct
import sys

READY = b"\0ready\n"
OUT_OF_MEMORY = 77
"""Exit status."""
PR_SET_PDEATHSIG, PR_SET_KEEPCAPS, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 8, 22, 38
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446
"""Numbers of its system calls, on every architecture."""
RIGHTS = {3: 15, 4: 15, 5: 16}
"""How many rights on files a version of Landlock knows; later ones know more of other kinds. Versions 1 and 2 (before
Linux 6.2) do not know truncation: there, open(path, O_RDONLY | O_TRUNC) empties a file that may only be read."""
CAP_DAC_READ_SEARCH = 2

libc = ctypes.CDLL(None, use_errno=True)


def checked(result: int, what: str) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def received(count: int) -> bytes:
    data = b""
    while len(data) < count:
        more = os.read(0, count - len(data))
        if not more:
            raise EOFError("the task ended early")
        data += more
    return data


def restrict_files(readable: list) -> None:
    """Landlock: nothing can be opened but these paths, and nothing at all executed."""
    version = checked(libc.syscall(LANDLOCK_CREATE, None, 0, 1), "Landlock is not available")
    if version < min(RIGHTS):
        raise OSError(
            f"version {version} of Landlock would let a program empty the files that it may read; it needs Linux 6.2"
        )
    handled = (1 << RIGHTS[min(version, max(RIGHTS))]) - 1
    # From version 4 on, no TCP; from 6 on, no abstract sockets and no signals to others.
    attributes = struct.pack("QQQ", handled, 3, 3)[: 8 if version < 4 else 16 if version < 6 else 24]
    rules = checked(libc.syscall(LANDLOCK_CREATE, attributes, len(attributes), 0), "landlock_create_ruleset")
    for path, rights in readable:
        try:
            opened = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        rule = struct.pack("=Qi", rights, opened)
        checked(libc.syscall(LANDLOCK_ADD, rules, 1, rule, 0), "landlock_add_rule for " + path)
        os.close(opened)
    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.syscall(LANDLOCK_RESTRICT, rules, 0), "landlock_restrict_self")
    os.close(rules)


def change_user(user: int, search: bool) -> None:
    """`search`: what Landlock shows can be read even where it lies in root's own folders."""
    os.setgroups([])
    os.setresgid(user, user, user)
    if search:
        checked(libc.prctl(PR_SET_KEEPCAPS, 1, 0, 0, 0), "keep capabilities")
    os.setresuid(user, user, user)
    if search:
        kept = 1 << CAP_DAC_READ_SEARCH
        header, sets = struct.pack("Ii", 0x20080522, 0), struct.pack("6I", kept, kept, 0, 0, 0, 0)
        checked(libc.capset(header, sets), "capset")


def restrict_calls(program: bytes) -> None:
    class Filter(ctypes.Structure):
        _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))

    checked(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no_new_privs")
    checked(libc.prctl(PR_SET_SECCOMP, 2, ctypes.byref(Filter(len(program) // 8, program)), 0, 0), "seccomp")


def run_script(source: str) -> None:
    main = type(sys)("__main__")
    sys.modules["__main__"] = main
    exec(compile(source, "program.py", "exec"), main.__dict__)


def run_calls(source: str, calls: list) -> None:
    import json

    results = os.dup(1)
    os.dup2(2, 1)  # what the program prints is not a result
    program = type(sys)("program")
    sys.modules["program"] = program
    exec(compile(source, "program.py", "exec"), program.__dict__)
    for call in calls:
        try:
            found = repr(plain(eval(call, program.__dict__))) if isinstance(call, str) else result(program, *call)
            text = json.dumps([found], default=number)
        except BaseException as error:
            text = json.dumps({"error": type(error).__name__})
        line = text.encode() + b"\n"
        while line:
            line = line[os.write(results, line) :]
    os._exit(0)


def plain(value: object) -> object:
    """Equal to `value`, of the types that literals have, as far as there is such a one."""
    if isinstance(value, dict):
        return {plain(key): plain(each) for key, each in value.items()}
    for kind in (list, tuple, set):
        if isinstance(value, kind):
            return kind(map(plain, value))
    if isinstance(value, frozenset):
        return set(value)
    return next((kind(value) for kind in (bool, int, float, str) if isinstance(value, kind)), number(value))


def number(value: object) -> object:
    """Python's own number for one of NumPy's, which has no JSON, and whose repr() names its type. Others stay."""
    numpy = sys.modules.get("numpy")
    return value.item() if numpy and isinstance(value, numpy.generic) else value


def result(place: object, name: str, arguments: list) -> object:
    """Of the function `f`, or of `Solution.f` of a new Solution()."""
    *owners, last = name.split(".")
    for owner in owners:
        place = getattr(place, owner)
        place = place() if isinstance(place, type) else place
    return getattr(place, last)(*arguments)


def main() -> None:
    (size,) = struct.unpack("<Q", received(8))
    task = eval(received(size), {"nan": float("nan"), "inf": float("inf")})
    sys.path[:] = [*(entry for entry in sys.path if entry), *task["path"]]
    if task["readable"] is not None:
        restrict_files(task["readable"])
    if task["user"] is not None:
        change_user(task["user"], search=task["readable"] is not None)
    checked(libc.prctl(PR_SET_PDEATHSIG, 9, 0, 0, 0), "end with the parent")
    if task["parent"] not in (None, os.getppid()):
        raise ProcessLookupError("the parent has ended")
    for number, limits in task["limits"].items():
        resource.setrlimit(number, limits)
    if task["filter"]:
        restrict_calls(task["filter"])
    os.write(1, READY)
    sys.argv = ["program.py"]
    try:
        if task["calls"] is None:
            run_script(task["program"])
        else:
            run_calls(task["program"], task["calls"])
    except MemoryError:
        os._exit(OUT_OF_MEMORY)


if __name__ == "__main__":
    main()
