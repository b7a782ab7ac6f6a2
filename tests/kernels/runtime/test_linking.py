"""The extension shares PyTorch's C++ library, also where the compiler alone would link a static one."""

import shutil
import subprocess

import pytest

from surgeon_kernels.runtime import toolchain

# As an error message does.
SOURCE = """#include <sstream>
extern "C" int written(long x) { std::ostringstream out; out << x; return out.str().size(); }
"""


def own_symbols(library):
    listed = subprocess.run(["nm", "--defined-only", str(library)], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "_ZNSo9_M_insertIlEERSoT_" in line]  # std::ostream's long


@pytest.mark.skipif(shutil.which("g++") is None or shutil.which("nm") is None, reason="needs g++ and nm")
def test_a_number_is_written_by_the_shared_library_where_there_is_a_static_one(tmp_path):
    (flag,) = toolchain.linker_flags()
    assert "libstdc++.so" in flag
    static = subprocess.run(["g++", "-print-file-name=libstdc++.a"], capture_output=True, text=True).stdout.strip()
    source = tmp_path / "number.cpp"
    source.write_text(SOURCE)
    found = {}
    for name, flags in {"without": [], "with": [flag]}.items():
        library = tmp_path / f"{name}.so"
        # gcc, unlike g++, adds no C++ library of its own choice.
        command = ["gcc", "-shared", "-fPIC", source, *flags, static, "-o", library]
        subprocess.run(list(map(str, command)), check=True)
        found[name] = own_symbols(library)
    assert found["without"] and not found["with"]
