"""TensorRT's real Python modules without TensorRT: `python tests/tensorrt/bindings.py FOLDER`.

The packages of the bindings install anywhere; only the libraries that they link to need a GPU's machine. Stub
libraries of the same names satisfy the dynamic linker and abort when they are called. So every class, method,
member and signature can be looked at, and code runs up to its first call into TensorRT.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

# Major version -> package and version.
PACKAGES = {
    "10": "tensorrt-cu12-bindings==10.13.3.9",
    "11": "tensorrt-cu13-bindings==11.4.0.106",
}
POLYGRAPHY = "polygraphy==0.53.6"
LIBRARIES = ("nvinfer", "nvonnxparser", "nvinfer_plugin")
# What the modules look up when they are loaded.
SYMBOLS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "initLibNvInferPlugins",
    "getPluginRegistry",
    "getBuilderPluginRegistry",
    "getInferLibVersion",
    "getNvOnnxParserVersion",
)
# A GPU of compute capability 8.7 with CUDA 12.6, as far as edgelm asks.
DRIVER = """
#include <string.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDeviceGetName(char *name, int size, int device) { strncpy(name, "Orin", size); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
  *value = attribute == 75 ? 8 : attribute == 76 ? 7 : -1;
  return 0;
}
int cuDriverGetVersion(int *version) { *version = 12060; return 0; }
"""


def folder_of(major: str) -> Path:
    """Where the modules of a major version are, or would be."""
    place = os.environ.get("EDGELM_TENSORRT_BINDINGS", sys.prefix)
    return Path(place) / f"tensorrt-{major}"


def environment(major: str) -> dict[str, str]:
    """The environment of a process that imports tensorrt."""
    folder = folder_of(major)
    root = Path(__file__).parents[2]
    paths = [str(root), str(folder), os.environ.get("PYTHONPATH", "")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(p for p in paths if p),
        "LD_LIBRARY_PATH": str(folder / "stubs"),
    }


def missing(major: str) -> str:
    """Why the modules of a major version cannot be used; empty if they can."""
    if not (folder_of(major) / "stubs" / "libcuda.so.1").is_file():
        return f"TensorRT {major}'s bindings are not in {folder_of(major)}: make bindings fetches them"
    return ""


def install(folder: Path, package: str, major: str) -> None:
    """Fetch a package and polygraphy, and link the stubs."""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    subprocess.run(
        [*pip, "--upgrade", "--target", folder, package, POLYGRAPHY], check=True
    )
    alias = folder / "tensorrt"
    alias.mkdir(exist_ok=True)
    (alias / "__init__.py").write_text(
        "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n",
        encoding="utf-8",
    )
    stubs = folder / "stubs"
    stubs.mkdir(exist_ok=True)
    body = "".join(f"void *{name}(void) {{ abort(); }}\n" for name in SYMBOLS)
    for name in LIBRARIES:
        _link(stubs / f"lib{name}.so.{major}", f"#include <stdlib.h>\n{body}")
    _link(stubs / "libcuda.so.1", DRIVER)


def _link(path: Path, source: str) -> None:
    file = path.with_suffix(".c")
    file.write_text(source, encoding="utf-8")
    command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{path.name}", "-o", path, file]
    subprocess.run(command, check=True)
    file.unlink()


def main() -> None:
    """Fetch both versions into a folder."""
    place = Path(sys.argv[1])
    if shutil.which("cc") is None:
        sys.exit("A C compiler (cc) is needed to make the stub libraries.")
    for major, package in PACKAGES.items():
        install(place / f"tensorrt-{major}", package, major)


if __name__ == "__main__":
    main()
