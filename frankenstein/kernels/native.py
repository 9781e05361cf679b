"""C kernels for the CPU, compiled once by the system's C compiler and called through ctypes.

Where there is no compiler, the callers' torch operations give the same results, slower; that is said once.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

log = logging.getLogger(__name__)

SWITCH = "FRANKENSTEIN_NATIVE"  # 0: no C kernels
CACHE = "FRANKENSTEIN_CACHE"
FLAGS = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-shared", "-fPIC")
TIMEOUT = 120  # seconds


@cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `<name>.c` of this folder; None where it cannot be compiled or FRANKENSTEIN_NATIVE=0.

    It is kept in $FRANKENSTEIN_CACHE, else in the user's cache folder, under a name made of the source, the compiler
    and the processor, so that a folder shared by several machines has one for each.
    """
    if os.environ.get(SWITCH, "1") == "0":
        return None
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CC", "cc"), "gcc", "clang"))), None)
    if compiler is None:
        log.warning("no C compiler (cc, gcc, clang) found: %s runs on torch operations, several times slower", name)
        return None
    try:
        return ctypes.CDLL(str(_built(name, compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        log.warning("%s runs on torch operations, several times slower: %s", name, _reason(error))
        return None


@torch.compiler.assume_constant_result  # torch.compile cannot look into ctypes
def available(name: str) -> bool:
    """Whether the kernels of `<name>.c` can be used on this machine; compiles them at the first call."""
    return library(name) is not None


def loaded(name: str) -> ctypes.CDLL:
    """The kernels of `<name>.c`, which must be available."""
    kernels = library(name)
    assert kernels is not None
    return kernels


@torch.compiler.assume_constant_result
def constant(name: str, of: str) -> int:
    """A size that the kernels of `<of>.c` were compiled with."""
    return int(getattr(loaded(of), name)())


def pointer(x: Tensor | None, dtype: torch.dtype = torch.float32) -> ctypes.c_void_p:
    """Address of a contiguous tensor of this dtype on the CPU, or of nothing."""
    if x is None:
        return ctypes.c_void_p(None)
    if not (x.is_cpu and x.is_contiguous() and x.dtype == dtype):
        raise ValueError(f"expected a contiguous {dtype} tensor on the CPU, found {x.dtype} on {x.device}")
    return ctypes.c_void_p(x.data_ptr())


def sizes(*values: int) -> list[ctypes.c_int64]:
    """As int64_t arguments, the number of torch's threads last."""
    return [ctypes.c_int64(n) for n in (*values, torch.get_num_threads())]


def _built(name: str, compiler: str) -> Path:
    source = Path(__file__).with_name(f"{name}.c")
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True, timeout=TIMEOUT).stdout
    headers = [path.read_bytes() for path in sorted(source.parent.glob("*.h"))]
    parts = (source.read_bytes(), *headers, version, " ".join(FLAGS).encode(), _processor().encode())
    key = hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]
    target = _folder() / f"{name}-{key}.so"
    if not target.exists():
        partial = target.with_suffix(f".{os.getpid()}.partial")
        try:
            # torch has loaded libgomp.so.1 already: the kernels run on the same threads.
            command = [compiler, *FLAGS, "-fopenmp", "-o", str(partial), str(source)]
            subprocess.run(command, capture_output=True, check=True, timeout=TIMEOUT)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    return target


def _folder() -> Path:
    """The first folder of the list that can be written to."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    for folder in (os.environ.get(CACHE), Path(cache_home) / "frankenstein"):
        if folder:
            path = Path(folder)
            try:
                path.mkdir(parents=True, exist_ok=True)
            except OSError:
                continue
            if os.access(path, os.W_OK):
                return path
    return Path(tempfile.mkdtemp(prefix="frankenstein-"))


def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    kept = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
    return "\n".join([platform.machine(), platform.processor(), *kept])


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = error.stderr.decode(errors="replace").strip().splitlines()
        return f"{error.cmd[0]} failed: {lines[0] if lines else f'exit status {error.returncode}'}"
    return str(error)
