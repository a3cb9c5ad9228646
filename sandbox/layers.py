"""The kernel's layers: what Linux enforces on a program, whatever the program manages to do.

`child.py` makes `Layers` in the fork server (inherited: no cost per job), `enter_child` is for every child. Nothing
needs root, a library or a privilege: each layer is tried and `Layers.active` says which ones hold. By their worth:

    seccomp        a child may compute, write its pipe and end; anything else kills it. This is the boundary.
    rlimits        CPU, address space, file size, processes
    Landlock       no file, no TCP, no signal to the outside, even where seccomp is missing
    namespaces     an empty root folder, no network, as root or where users may create them
    another uid    when started as root: an id nobody has, no capabilities

What it deliberately leaves out, since seccomp refuses what they would: a pid namespace (it would double a lane's
memory), cgroups (they need root). On macOS only the rlimits remain, and there not the one on memory. Paper: arXiv
2505.03335 runs programs without isolation; this is ours. Usage: through `child.py`.
"""

import ctypes
import os
import resource
import signal
import struct
import sys
import time
from contextlib import suppress

MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}  # audit architecture, column in the tables below
ALLOWED_CALLS = (  # name:x86-64:aarch64. A child computes, writes its pipe and ends
    "read:0:63 write:1:64 close:3:57 fstat:5:80 lseek:8:62 mmap:9:222 mprotect:10:226 munmap:11:215 brk:12:214 "
    "rt_sigprocmask:14:135 rt_sigreturn:15:139 sched_yield:24:124 mremap:25:216 madvise:28:233 getpid:39:172 "
    "exit:60:93 gettimeofday:96:169 sigaltstack:131:132 gettid:186:178 time:201: futex:202:98 restart_syscall:219:128 "
    "clock_gettime:228:113 clock_getres:229:114 exit_group:231:94 getrandom:318:278"
)
REFUSED_CALLS = (  # fail with EPERM: honest programs cause them (lazy imports, warnings). Any other call kills
    "open:2: stat:4: lstat:6: rt_sigaction:13:134 ioctl:16:29 pread64:17:67 access:21: uname:63:160 fcntl:72:25 "
    "getcwd:79:17 readlink:89: getrusage:98:165 sysinfo:99:179 times:100:153 getuid:102:174 getgid:104:176 "
    "geteuid:107:175 getegid:108:177 getppid:110:173 sched_getaffinity:204:123 getdents64:217:61 tgkill:234:131 "
    "openat:257:56 newfstatat:262:79 readlinkat:267:78 faccessat:269:48 prlimit64:302:261 statx:332:291 "
    "faccessat2:439:439"
)
NEW_USER, NEW_SPACES = 0x10000000, {"mount": 0x20000, "uts": 0x4000000, "ipc": 0x8000000, "net": 0x40000000}
PR_SET_PDEATHSIG, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 1, 22, 38


def seccomp_filter(audit: int, column: int) -> bytes:
    """A classic BPF program over (architecture, call number): allow, refuse with EPERM, or kill the process."""
    tables = [[line.split(":")[1 + column] for line in table.split()] for table in (ALLOWED_CALLS, REFUSED_CALLS)]
    allowed, refused = ([int(number) for number in table if number] for table in tables)
    code = [(0x20, 0, 0, 4), (0x15, 1, 0, audit), (0x06, 0, 0, 0x80000000), (0x20, 0, 0, 0)]
    total = len(allowed) + len(refused)  # after these: kill, refuse, allow
    for place, number in enumerate(allowed + refused):
        code.append((0x15, total - place - 1 + (2 if place < len(allowed) else 1), 0, number))
    code += [(0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x00050001), (0x06, 0, 0, 0x7FFF0000)]
    return b"".join(struct.pack("HBBI", *line) for line in code)


class Layers:
    """Made in the server, which it confines; `enter_child` is for every child; `active` says what holds."""

    def __init__(self, isolation: str, file_bytes: int) -> None:
        """Namespaces, another uid, no capabilities, no_new_privs, Landlock; then seccomp, after a trial in a child."""
        self.base, self.filter = 0, b""
        self.active: dict = {"platform": sys.platform, "rlimits": True, "cpu_clock": cpu_clock(os.getpid()) > 0}
        self.active |= dict.fromkeys(("seccomp", "landlock", "namespaces", "empty_root", "uid_dropped"), False)
        with suppress(OSError), open("/proc/self/statm") as statm:
            self.base = int(statm.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
        self.libc = ctypes.CDLL(None) if sys.platform == "linux" and isolation != "minimal" else None
        if self.libc is None:
            return
        self.unshare()
        if os.geteuid() == 0:
            uid = 61_000 + os.getpid() % 4_000  # nobody's: RLIMIT_NPROC and file permissions mean nothing to root
            with suppress(OSError):
                os.setgroups([])
                os.setresgid(uid, uid, uid)
                os.setresuid(uid, uid, uid)
                self.active["uid_dropped"] = True
        self.call("capset", (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)())
        self.call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        self.landlock()
        if os.uname().machine in MACHINES:
            program = seccomp_filter(*MACHINES[os.uname().machine])
            self.text = ctypes.create_string_buffer(program, len(program))
            self.filter = struct.pack("HP", len(program) // 8, ctypes.addressof(self.text))
            self.active["seccomp"] = self.probe()
            self.filter = self.filter if self.active["seccomp"] else b""

    def call(self, name: str, *args) -> int:
        """A libc function by name; integers are passed as longs (variadic prctl and syscall read whole registers)."""
        return getattr(self.libc, name)(*[ctypes.c_long(a) if isinstance(a, int) else a for a in args])

    def unshare(self) -> None:
        uid, gid = os.getuid(), os.getgid()
        if self.call("unshare", sum(NEW_SPACES.values()) + (NEW_USER if uid else 0)) != 0:
            return
        self.active["namespaces"] = [*NEW_SPACES] + ["user"] * (uid != 0)
        if uid:
            for file, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
                with suppress(OSError), open(f"/proc/self/{file}", "w") as out:
                    out.write(text)
        self.call("mount", None, b"/", None, 0x44000, None)  # private, recursive: nothing below is seen outside
        flags = 15  # read-only, nothing set-uid, no devices, nothing executable
        if self.call("mount", b"none", b"/tmp", b"tmpfs", flags, b"size=4k") == 0:
            with suppress(OSError):
                os.chroot("/tmp")
                os.chdir("/")
                self.active["empty_root"] = True

    def landlock(self) -> None:
        """Handle every right this kernel knows and grant none: no file, no TCP, no signal or socket to the outside."""
        abi = self.call("syscall", 444, None, 0, 1)
        rights = (1 << (0, 13, 14, 15, 15, 16)[max(0, min(abi, 5))]) - 1
        ruleset = struct.pack("QQQ", rights, 3 if abi >= 4 else 0, 3 if abi >= 6 else 0)  # any kernel takes zeros
        handle = self.call("syscall", 444, ruleset, len(ruleset), 0)
        if handle >= 0:
            self.active["landlock"] = abi if self.call("syscall", 446, handle, 0) == 0 else 0
            os.close(handle)

    def probe(self) -> bool:
        """True if a confined child dies of SIGSYS when it forks: the layer is tried, not believed."""
        pid = os.fork()
        if pid == 0:
            try:
                self.enter_child(1.0, 1 << 28, 0)
                os.fork()
            finally:
                os._exit(0)
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGSYS

    def enter_child(self, cpu_s: float, memory: int, processes: int) -> None:
        os.setsid()  # a group of its own, so that whatever it may start dies with it
        cpu = int(cpu_s) + 2
        resource.setrlimit(resource.RLIMIT_CPU, (cpu, cpu + 1))  # a backstop; the server reads the clock
        resource.setrlimit(resource.RLIMIT_NPROC, (processes, processes))
        if self.base:
            resource.setrlimit(resource.RLIMIT_AS, (self.base + memory, self.base + memory))
        if self.libc is not None:
            self.call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if self.filter and self.call("prctl", PR_SET_SECCOMP, 2, self.filter, 0, 0) != 0:
            os._exit(1)  # the probe said it works: better no claim at all than an unconfined program


def cpu_clock(pid: int) -> float:
    """CPU seconds of another process (clock_getcpuclockid(3)); 0 where there is no such clock."""
    try:
        return time.clock_gettime((~pid << 3) | 2)
    except OSError:
        return 0.0
