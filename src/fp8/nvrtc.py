"""CUDA C++ at run time: NVRTC, which comes with torch, compiles a source of this package for the GPU that is there.

For the few kernels that Triton cannot make fast. A kernel is compiled when it is first needed (a few seconds), once for
each set of constants, and kept: for the life of the process, and for later ones in the user's cache (`cache_folder`),
under a name that is made of all that went into it. No toolkit is needed, and the sources include no headers.
Compilation never fuses a multiply and an add, so that our kernels round as written.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from .errors import BackendError

Constants = tuple[tuple[str, int], ...]
MOST_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
EARLY = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
PACKAGE = Path(__file__).parent


def libraries() -> list[str]:
    """Where NVRTC may be, best first: beside torch's other libraries, then where the system looks."""
    found: list[str] = []
    spec = importlib.util.find_spec("nvidia")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        found += sorted(map(str, Path(folder).glob("*/lib/libnvrtc.so.[0-9]*")), reverse=True)
    major = (torch.version.cuda or "13").partition(".")[0]
    return [*found, f"libnvrtc.so.{major}", "libnvrtc.so"]


@functools.cache
def library() -> ctypes.CDLL | None:
    """NVRTC, or None where it is not installed."""
    for name in libraries():
        try:
            beside = Path(name).parent.glob("libnvrtc-builtins.so.[0-9]*") if os.path.isabs(name) else ()
            for builtins in beside:  # NVRTC would look for them in the system's folders only
                ctypes.CDLL(str(builtins))
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def why_not() -> str | None:
    """Why nothing can be compiled; None when it can."""
    return None if library() is not None else "NVRTC is not installed (it comes with torch's CUDA builds)"


def build(source: str, constants: Mapping[str, int], capability: str = "90") -> bytes:
    """The binary (cubin) of a source, relative to the package, with `constants` as macros. Raises `BackendError`."""
    nvrtc = library()
    if nvrtc is None:
        raise BackendError(f"{source} cannot be compiled: {why_not()}.")
    program = ctypes.c_void_p()
    text = (PACKAGE / source).read_bytes()
    _check(nvrtc, nvrtc.nvrtcCreateProgram(ctypes.byref(program), text, source.encode(), 0, None, None))
    words = [f"--gpu-architecture=sm_{capability}", "--fmad=false", "--std=c++17"]
    words += [f"-D{name}={value}" for name, value in constants.items()]
    options = (ctypes.c_char_p * len(words))(*(word.encode() for word in words))
    try:
        if nvrtc.nvrtcCompileProgram(program, len(words), options):
            raise BackendError(f"NVRTC refuses {source} with {dict(constants)}:\n{_text(nvrtc, program, 'ProgramLog')}")
        return _bytes(nvrtc, program, "CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


def cache_folder() -> Path:
    """Where compiled kernels are kept; deleting it costs a few seconds. RuntimeError: the user has no home."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fp8" / "kernels"


def cached(source: str, constants: Mapping[str, int], capability: str) -> bytes:
    """`build`, or what an earlier process built of the same source, constants and compiler."""
    parts = [(PACKAGE / source).read_bytes(), repr(sorted(constants.items())).encode(), capability.encode()]
    name = f"{hashlib.sha256(b'|'.join([*parts, version().encode()])).hexdigest()}.cubin"
    try:
        return (cache_folder() / name).read_bytes()
    except (OSError, RuntimeError):  # it is not there, or the user has no home
        binary = build(source, constants, capability)
    with contextlib.suppress(OSError, RuntimeError):  # no room, or nowhere to write: the kernel itself is there
        folder = cache_folder()
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder) as aside:
            aside.write(binary)
            aside.flush()
            os.link(aside.name, folder / name)
    return binary


def version() -> str:
    """NVRTC's version, or why there is none."""
    nvrtc = library()
    if nvrtc is None:
        return str(why_not())
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(nvrtc, nvrtc.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return f"{major.value}.{minor.value}"


def _bytes(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> bytes:
    size = ctypes.c_size_t()
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    buffer = ctypes.create_string_buffer(size.value)
    _check(nvrtc, getattr(nvrtc, f"nvrtcGet{what}")(program, buffer))
    return buffer.raw


def _text(nvrtc: ctypes.CDLL, program: ctypes.c_void_p, what: str) -> str:
    return _bytes(nvrtc, program, what).rstrip(b"\0").decode(errors="replace")


def _check(nvrtc: ctypes.CDLL, status: int) -> None:
    if status:
        nvrtc.nvrtcGetErrorString.restype = ctypes.c_char_p
        raise BackendError(f"NVRTC: {nvrtc.nvrtcGetErrorString(status).decode()}")


# --------------------------------------------------------------------------- on the GPU


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def _done(status: int, what: str) -> None:
    if status:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise BackendError(f"{what}: {(text.value or b'unknown error').decode()}")


def _enter_context(device: int) -> None:
    """See to it that this thread has a context: a thread that has called nothing but the driver yet has none."""
    context = ctypes.c_void_p()
    _done(_driver().cuCtxGetCurrent(ctypes.byref(context)), "finding the context")
    if not context:
        _done(_driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), device), "finding the GPU's context")
        _done(_driver().cuCtxSetCurrent(context), "entering the GPU's context")


@functools.cache
def _loaded(source: str, name: str, constants: Constants, device: int, shared: int) -> ctypes.c_void_p:
    if torch.cuda.is_current_stream_capturing():
        raise BackendError(f"{name} of {source} is first needed while a CUDA graph is captured: run the step before.")
    major, minor = torch.cuda.get_device_capability(device)
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    binary = cached(source, dict(constants), f"{major}{minor}")
    with torch.cuda.device(device):
        _enter_context(device)
        _done(_driver().cuModuleLoadData(ctypes.byref(module), binary), f"loading {source}")
        _done(_driver().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
        _done(
            _driver().cuFuncSetAttribute(function, MOST_SHARED, shared), f"{shared} bytes of shared memory for {name}"
        )
    return function


class Attribute(ctypes.Structure):
    """`CUlaunchAttribute`: its name, and at an offset of 8 a union of 64 bytes, of which `allowed` is the one used."""

    _fields_ = (
        ("name", ctypes.c_int), ("gap", ctypes.c_int), ("allowed", ctypes.c_int), ("rest", ctypes.c_int * 15),
    )  # fmt: skip


class Config(ctypes.Structure):
    """`CUlaunchConfig`."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.c_void_p), ("count", ctypes.c_uint),
    )  # fmt: skip


def launch(
    source: str, name: str, constants: Constants, device: torch.device, blocks: int, threads: int, *arguments: object,
    shared: int = 0, early: bool = False,
) -> None:  # fmt: skip
    """Start a kernel on the current stream. Arguments are ctypes values or structures, in the kernel's order; `shared`
    bytes of shared memory are its own to divide.

    early    programmatic dependent launch: it may start while the kernel before it still runs, and must itself execute
             `griddepcontrol.wait` before it reads what that one writes or writes what that one reads. When that is
             allowed, the kernel before says by `griddepcontrol.launch_dependents`, or by ending. Holds in CUDA graphs.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    function = _loaded(source, name, constants, index, shared)
    pointers = (ctypes.c_void_p * len(arguments))(*(ctypes.addressof(a) for a in arguments))  # type: ignore[arg-type]
    stream = ctypes.c_void_p(torch.cuda.current_stream(index).cuda_stream)
    with torch.cuda.device(index):
        _enter_context(index)
        if early:
            attribute = Attribute(name=EARLY, allowed=1)
            config = Config((blocks, 1, 1), (threads, 1, 1), shared, stream.value, ctypes.addressof(attribute), 1)
            status = _driver().cuLaunchKernelEx(ctypes.byref(config), function, pointers, None)
        else:
            status = _driver().cuLaunchKernel(function, blocks, 1, 1, threads, 1, 1, shared, stream, pointers, None)
    _done(status, f"starting {name}")
