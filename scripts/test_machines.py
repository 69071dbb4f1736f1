"""The tests on other machines than this one: older instructions, more threads, other planted worlds.

    python scripts/test_machines.py             every row
    python scripts/test_machines.py old seed    the rows whose names begin so
    python scripts/test_machines.py old -- tests/functional/test_topk.py -x    some tests only

A row emulates one kind of machine by what PyTorch (ATEN_CPU_CAPABILITY), oneDNN (ONEDNN_MAX_CPU_ISA), MKL
(MKL_ENABLE_INSTRUCTIONS) and numpy's OpenBLAS (OPENBLAS_CORETYPE) believe of the processor, so that every setting of
each meets some row; a machine cannot be made to have what it lacks. Each row prints its verdict, and one that fails
fails the whole.
"""

import os
import subprocess
import sys
import time

BLAS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")

# name: ATen, oneDNN, MKL, OpenBLAS ("" is what the processor has), threads, seed offset
ROWS = {
    "this machine, 2 threads": ("", "", "", "", 2, 0),
    "this machine, 4 threads": ("", "", "", "", 4, 0),
    "old: 2010, no AVX": ("default", "SSE41", "SSE4_2", "NEHALEM", 1, 0),
    "old: 2012, AVX": ("default", "AVX", "AVX", "SANDYBRIDGE", 2, 0),
    "laptop: AVX2": ("avx2", "AVX2", "AVX2", "HASWELL", 1, 0),
    "laptop: AVX2 of AMD, 4 threads": ("avx2", "AVX2", "AVX2", "ZEN", 4, 0),
    "server: AVX512 without VNNI": ("", "AVX512_CORE", "AVX512", "SKYLAKEX", 2, 0),
    "mixed: AVX2 kernels of ATen, no limit else": ("avx2", "", "", "HASWELL", 1, 0),
    **{f"seeds: other worlds, {n}": ("", "", "", "", 1, n) for n in (1, 2, 3, 4, 5)},
}
SETTINGS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "OPENBLAS_CORETYPE")


def run_row(name: str, pytest_arguments: list[str]) -> bool:
    """Whether the tests pass on one kind of machine."""
    *limits, threads, offset = ROWS[name]
    env = {key: value for key, value in os.environ.items() if key not in SETTINGS}
    env |= {key: str(value) for key, value in zip(SETTINGS, limits, strict=True) if value}
    # Threads of tests that run side by side must not spin while they wait for each other.
    env |= dict.fromkeys(BLAS, str(threads)) | {"HF_HUB_OFFLINE": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    # doctests show numbers of their own seeds
    paths = [] if any(a.startswith("tests") for a in pytest_arguments) or not offset else ["tests"]
    command = [sys.executable, "-m", "pytest", "-q", "--seed-offset", str(offset), *paths, *pytest_arguments]
    start = time.perf_counter()
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.strip().splitlines()
    verdict = "ok" if done.returncode == 0 else "FAILED"
    print(f"{verdict:<7}{name:<44}{time.perf_counter() - start:>7.0f} s  {lines[-1] if lines else ''}", flush=True)
    if done.returncode:
        print(*(f"       {line}" for line in lines if line.startswith(("FAILED", "ERROR"))), sep="\n", flush=True)
    return done.returncode == 0


def main() -> int:
    """Run the rows asked for, all of them without names; 1 where one failed."""
    names, _, rest = " ".join(sys.argv[1:]).partition("--")
    asked = names.split()
    chosen = [name for name in ROWS if not asked or any(name.startswith(a) for a in asked)]
    if not chosen:
        print(f"A row must be one of {', '.join(ROWS)}; got {names}.")
        return 2
    verdicts = [run_row(name, rest.split()) for name in chosen]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    raise SystemExit(main())
