"""Make torch's CUDA build load on a machine without CUDA's libraries, at a tenth of the size.

Where it stands: run once, while the development image's torch environment is built (`Dockerfile` in this folder), over
an environment into which torch was installed from PyPI *without* its nvidia-* dependencies. Production images never
see it: `exporters/Dockerfile` installs the whole lock.

Why: PyPI has only the CUDA build of torch for Linux on x86-64: 5 GB, of which a machine with no GPU uses a tenth. Its
libraries name libcudart, libcudnn and others as needed, and `import torch` fails unless every one of them exists and
defines every symbol imported from it, in the right symbol version. Yet all that is asked of them where there is no GPU
is how many devices there are.

What it does to the torch and torchvision folders below the given site-packages:

1. deletes libraries that are opened only when a GPU operator runs or never, and what only compilers and test suites read;
2. writes a stub for each soname that is needed and not there: its functions answer cudaErrorNoDevice;
3. cuts out of torch's large libraries the GPU's machine code and the symbol tables that only debuggers read. All code
   for the CPU and every registration of operators stays, so torch behaves as its full build does without a GPU.

Usage: python3 shrink_torch.py SITE_PACKAGES       (needs binutils: nm, readelf, as, ld)
"""

from __future__ import annotations

import platform
import re
import shutil
import struct
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

UNUSED = (
    "torch/lib/libtorch_cuda_linalg.so",
    "torch/lib/libcaffe2_nvrtc.so",
    "torch/lib/libgfortran.so*",
    "torch/include",
    "torch/share",
    "torch/bin/protoc*",
)
GPU_CODE = ".nv_fatbin"
CUT_FROM = 10 * 2**20  # bytes; smaller libraries are not worth it
LOADER = "ld-linux-x86-64.so.2"
SYSTEM = Path("/usr/lib/x86_64-linux-gnu")
PAGE = 4096
PT_LOAD, PT_NOTE = 1, 4

# 100 is cudaErrorNoDevice and CUDA_ERROR_NO_DEVICE; to the interfaces with other lists of errors it is some error.
RETURN_NO_DEVICE = "movl $100, %eax\nret"
RETURN_TEXT = "leaq text(%rip), %rax\nret"
TEXT = 'text: .asciz "this development build of torch has no CUDA libraries"'

# What may be stubbed: a library of NVIDIA's. Anything else that is missing is a fault of the base image.
NVIDIA = ("libcu", "libnv", "libnccl.")


def output(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


# --- stubs ------------------------------------------------------------------------------------------------------------


def needed(library: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output("readelf", "--dynamic", "--wide", library)))


def imported(library: Path) -> set[tuple[str, str]]:
    """The (symbol, version) pairs that must be there; weak ones need not. No version is ''."""
    names = re.findall(r"^\s+U (\S+)$", output("nm", "-D", "--undefined-only", library), re.MULTILINE)
    return {(name, version) for name, _, version in (entry.partition("@") for entry in names)}


def version_owners(library: Path) -> dict[str, str]:
    """Which soname each symbol version is asked of."""
    owners, soname = {}, ""
    for file, name in re.findall(r"File: (\S+)|Name: (\S+)  Flags", output("readelf", "--version-info", "--wide", library)):
        soname = file or soname
        owners |= {name: soname} if name else {}
    return owners


def exported(library: Path) -> set[str]:
    lines = output("nm", "-D", "--defined-only", library).splitlines()
    return {line.split()[-1].partition("@")[0] for line in lines}


def union(sets: Iterable[set]) -> set:
    return set().union(*sets)


def find_stubs(site_packages: Path) -> dict[str, dict[str, set[str]]]:
    """The stubs to write: soname -> symbol version ('' for none) -> symbols."""
    libraries = [p for package in ("torch", "torchvision") for p in (site_packages / package).rglob("*.so*")]
    bundled = list(site_packages.glob("*.libs/*.so*"))
    wanted = union(map(needed, libraries)) - {p.name for p in libraries + bundled} - {LOADER}
    stubs = {soname: defaultdict(set) for soname in wanted if not (SYSTEM / soname).exists()}
    if strange := [soname for soname in stubs if not soname.startswith(NVIDIA)]:
        raise SystemExit(f"shrink_torch: the base image lacks {', '.join(strange)}, which torch needs")

    provided = union(map(exported, libraries + bundled + [SYSTEM / soname for soname in wanted - set(stubs)]))
    runtime = next(soname for soname in stubs if soname.startswith("libcudart.so"))
    asked = [pair for library in libraries for pair in version_owners(library).items()]
    owners = {version: soname for version, soname in asked if soname in stubs}
    for name, version in union(map(imported, libraries)):
        if version in owners:
            stubs[owners[version]][version].add(name)
        elif not version and name not in provided and not re.match("_?Py", name):
            # From a library that versions nothing. The loader takes such a symbol from any library that is loaded.
            stubs[runtime][""].add(name)
    return stubs


def assembly(symbols: Iterable[str]) -> str:
    lines = [".text"]
    for symbol in sorted(symbols):
        body = RETURN_TEXT if re.search("ErrorString|ErrorName|GetLastErrorMsg", symbol) else RETURN_NO_DEVICE
        lines += [f".globl {symbol}", f".type {symbol}, @function", f"{symbol}:", body]
    return "\n".join([*lines, ".section .rodata", TEXT, '.section .note.GNU-stack,"",@progbits', ""])


def write_stub(target: Path, versions: dict[str, set[str]]) -> None:
    nodes = [f"{version} {{ {'; '.join(sorted(names))}; }};" for version, names in versions.items() if version]
    with tempfile.TemporaryDirectory() as scratch:
        source, script, compiled = (Path(scratch, name) for name in ("stub.s", "stub.map", "stub.o"))
        source.write_text(assembly(union(versions.values())))
        script.write_text("\n".join(nodes))
        output("as", source, "-o", compiled)
        script_option = [f"--version-script={script}"] if nodes else []
        output("ld", "-shared", f"-soname={target.name}", *script_option, compiled, "-o", target)


# --- cutting ----------------------------------------------------------------------------------------------------------


def section(library: Path, name: str) -> tuple[int, int] | None:
    """Where a section lies in the file: (start, end)."""
    match = re.search(rf" {re.escape(name)} +\S+ +\S+ (\S+) (\S+)", output("readelf", "--sections", "--wide", library))
    return (int(match[1], 16), int(match[1], 16) + int(match[2], 16)) if match else None


def cut(library: Path) -> None:
    """Rewrite a library with only what its loaded segments hold, less the GPU code.

    Addresses in memory stay as they are; only the offsets in the file move, by whole pages. The GPU code becomes a hole
    between two segments, so one program header more is needed: it takes the place of the note, which nothing reads. The
    section headers go: a loader does not read them, and they would describe what is no longer there.
    """
    data = library.read_bytes()
    header = list(struct.unpack_from("<16sHHIQQQIHHHHHH", data))
    table, count = header[5], header[10]
    programs = [list(struct.unpack_from("<IIQQQQQQ", data, table + 56 * i)) for i in range(count)]
    hole = section(library, GPU_CODE)

    pieces = []
    for program in (p for p in programs if p[0] != PT_NOTE):
        kind, flags, offset, address, physical, in_file, in_memory, align = program
        if kind == PT_LOAD and hole and offset <= hole[0] and hole[1] <= offset + in_file:
            first, second = hole[0] - offset, hole[1] // PAGE * PAGE - offset
            pieces.append([kind, flags, offset, address, physical, first, first, align])
            starts = [offset + second, address + second, physical + second]
            pieces.append([kind, flags, *starts, in_file - second, in_memory - second, align])
        else:
            pieces.append(program)
    if len(pieces) > count:
        raise SystemExit(f"shrink_torch: {library} has no program header to spare for the hole its GPU code leaves")

    result, moved = bytearray(), []
    for _, _, offset, _, _, in_file, _, _ in sorted((p for p in pieces if p[0] == PT_LOAD), key=lambda p: p[2]):
        result += bytes((offset - len(result)) % PAGE)
        moved.append((offset, offset + in_file, len(result) - offset))
        result += data[offset : offset + in_file]
    for program in pieces:
        if program[5]:  # bytes in the file
            program[2] += next(shift for start, end, shift in moved if start <= program[2] < end)
    header[6], header[12], header[13] = 0, 0, 0
    header[10] = len(pieces)
    struct.pack_into("<16sHHIQQQIHHHHHH", result, 0, *header)
    for i, program in enumerate(pieces):
        struct.pack_into("<IIQQQQQQ", result, table + 56 * i, *program)
    library.write_bytes(result)


def main(site_packages: Path) -> None:
    if platform.machine() != "x86_64":
        raise SystemExit(f"shrink_torch: written for x86_64, this is {platform.machine()}; use the full environment here")
    for pattern in UNUSED:
        for path in site_packages.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    for soname, versions in find_stubs(site_packages).items():
        write_stub(site_packages / "torch" / "lib" / soname, versions)
        print(f"{soname}: {sum(map(len, versions.values()))} symbols")
    for library in (p for p in (site_packages / "torch" / "lib").glob("*.so") if p.stat().st_size > CUT_FROM):
        before = library.stat().st_size
        cut(library)
        print(f"{library.name}: {before // 2**20} MiB, now {library.stat().st_size // 2**20} MiB")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
