"""The kernels' instruction sets that the CPU at hand lacks, run on one that is emulated.

One C program (`kernels_reference.c`) checks them all against float64: for ARM it is cross-compiled and
run by qemu; for x86 it is compiled with a header that puts SIMDe's portable C in place of every vector
instruction, since no qemu knows AVX-512. What that leaves unproven is which instructions a compiler
picks for them. A kernel that comes to use an instruction which SIMDe lacks needs it added to
`kernels_emulated/immintrin.h`.
"""

import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="the kernels are not built there"),
    pytest.mark.xdist_group("emulated"),  # who builds them once
]

TESTS = Path(__file__).parent
SOURCES = [TESTS / "kernels_reference.c", TESTS.parent / "cake/kernels/matrix.c"]
# As setup.py: besides the language it says whether products and sums may fuse.
DIALECT = ("-fno-trapping-math", "-std=c11")
EMULATED = ["-O0", "-Wno-psabi", "-I", TESTS / "kernels_emulated"]  # optimizing takes minutes
ON_X86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="of x86-64 only")
X86_SETS = ["avx512bf16", "avx512vnni", "avxvnni", "avx2"]


def needs(*tools: str) -> pytest.MarkDecorator:
    """Skip where one of these is not installed."""
    missing = ", ".join(tool for tool in tools if shutil.which(tool) is None)
    return pytest.mark.skipif(bool(missing), reason=f"{missing} not installed")


def call(command: list[str | Path], stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, input=stdin, capture_output=True, text=True, timeout=120)


def build(directory: Path, compiler: str, *options: str | Path) -> Path:
    program = directory / "kernels_reference"
    built = call([compiler, *DIALECT, *options, *SOURCES, "-lm", "-o", program])
    assert built.returncode == 0, built.stderr
    return program


def sets_of(*program: str | Path) -> list[str]:
    """The instruction sets that the kernels offer on the CPU which runs this."""
    listed = call([*program])
    assert listed.returncode == 0, listed.stderr
    return listed.stdout.split()


def assert_all_agrees(instruction_set: str, *program: str | Path) -> None:
    run = call([*program, instruction_set])
    assert run.returncode == 0, f"status {run.returncode}: {run.stdout}{run.stderr}"
    n_agreed = re.fullmatch(rf"{instruction_set}: (\d+) products and (\d+) blocks agree\n", run.stdout)
    assert n_agreed, run.stdout
    assert (int(n_agreed[1]), int(n_agreed[2])) == (445100, 16)


@pytest.fixture(scope="module")
def native(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("native"), "gcc", "-O3")


@pytest.fixture(scope="module")
def arm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("arm"), "aarch64-linux-gnu-gcc", "-O3", "-static")


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    header = ["gcc", "-fsyntax-only", "-x", "c", "-"]
    if call(header, "#include <simde/x86/avx512/dpbusd.h>").returncode:
        pytest.skip("SIMDe (libsimde-dev) not installed, or one without AVX-512 VNNI")
    return build(tmp_path_factory.mktemp("emulated"), "gcc", *EMULATED)


@needs("gcc")
def test_every_set_of_this_cpu_agrees(native: Path) -> None:
    """The program itself is sound where nothing is emulated."""
    names = sets_of(native)
    if not names:
        pytest.skip("no instruction set of the kernels here")
    for name in names:
        assert_all_agrees(name, native)


@ON_X86
@needs("gcc")
@pytest.mark.parametrize("instruction_set", X86_SETS)
def test_x86_sets_agree_in_portable_c(emulated: Path, instruction_set: str) -> None:
    offered = sets_of(emulated)
    if instruction_set == "avxvnni" and instruction_set not in offered:
        pytest.skip("this compiler is older than AVX-VNNI")
    assert offered == [name for name in X86_SETS if name in offered], "best first"
    assert_all_agrees(instruction_set, emulated)


@needs("aarch64-linux-gnu-gcc", "qemu-aarch64")
def test_arm_agrees_in_qemu(arm: Path) -> None:
    assert_all_agrees("neon", "qemu-aarch64", arm)


@needs("aarch64-linux-gnu-gcc", "qemu-aarch64")
def test_an_arm_cpu_without_dot_products_is_offered_nothing(arm: Path) -> None:
    assert sets_of("qemu-aarch64", "-cpu", "max", arm) == ["neon"]
    assert sets_of("qemu-aarch64", "-cpu", "cortex-a57", arm) == []


@ON_X86
@needs("gcc", "qemu-x86_64")
def test_an_x86_cpu_without_avx2_is_offered_nothing(native: Path) -> None:
    assert sets_of("qemu-x86_64", "-cpu", "Nehalem", native) == []
