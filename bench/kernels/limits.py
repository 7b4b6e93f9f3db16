"""Resources that a compiled kernel uses of an SM, and their limits."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Multiprocessor:
    """The resources of an SM.

    An SM has 64 K registers of 32 bits, a quarter for each scheduler, allocated to warps in units of 256. Source: the
    table of compute capabilities in NVIDIA's CUDA C++ Programming Guide.

    Args:
        shared: bytes of shared memory.
        block_shared: bytes of shared memory that one block may have.
        warps: resident warps.
        blocks: resident blocks.
    """

    shared: int
    block_shared: int
    warps: int
    blocks: int

    def occupancy(self, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> float:
        """Return the share of the SM's warps that can be resident at once.

        Args:
            registers: registers per thread.
            shared: shared memory per block, bytes.
            warps: warps per block.
            tensor_memory: tensor memory columns per block, of the 512 of sm_100.
        """
        of_warp = -(-max(registers, 1) * 32 // 256) * 256
        blocks = min(self.blocks, self.warps // warps, 4 * (16384 // of_warp) // warps)
        blocks = min(blocks, self.shared // (shared + 1024))  # the system reserves 1 KB per block
        if tensor_memory:
            blocks = min(blocks, 512 // tensor_memory)
        return blocks * warps / self.warps


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10, 163 << 10, 64, 32),
    89: Multiprocessor(100 << 10, 99 << 10, 48, 24),
    90: Multiprocessor(228 << 10, 227 << 10, 64, 32),
    100: Multiprocessor(228 << 10, 227 << 10, 64, 32),
}
# Patterns in PTX. mma and wgmma are families: mma.sync and wgmma.mma_async.
_INSTRUCTIONS = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
_NARROW_DOT = re.compile(r"tt\.dot\b[^\n]*:\s*tensor<[0-9x]+x(?:bf16|f16)>")


def inspect(compiled: Any, arch: int) -> dict[str, Any]:
    """Return the resource figures of a compiled kernel.

    Args:
        compiled: the kernel, from Triton's compiler.
        arch: its compute capability.

    Returns:
        `warps`, `registers` per thread, `spills` (bytes of stack and local memory per thread), `shared` (bytes per
        block), `occupancy`, `dots` (`tl.dot` of 16-bit factors in the source), `tensor_cores` (the instructions).
    """
    ptx, usage = compiled.asm["ptx"], resource_usage(compiled.asm["cubin"])
    threads = re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)
    assert threads is not None, "the PTX does not name the threads of a block"
    warps = int(threads[1]) // 32  # with those that Triton adds
    # The cubin does not hold the launch's shared memory; since sm_90 it holds the system's reserved kilobyte.
    shared = compiled.metadata.shared
    occupancy = MULTIPROCESSORS[arch].occupancy(usage["REG"], shared, warps, compiled.metadata.tmem_size or 0)
    return {
        "warps": warps,
        "registers": usage["REG"],
        "spills": max(usage["STACK"], usage["LOCAL"]),
        "shared": shared,
        "occupancy": round(occupancy, 4),
        "dots": len(_NARROW_DOT.findall(compiled.asm["ttir"])),
        "tensor_cores": [name for name, pattern in _INSTRUCTIONS.items() if re.search(pattern, ptx)],
    }


def resource_usage(cubin: bytes) -> dict[str, int]:
    """Return REG, STACK, SHARED and LOCAL of the only function in a cubin, as `cuobjdump` reports them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: list[str | Path] = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def complaints(row: dict[str, Any]) -> list[str]:
    """Return a sentence for each limit that a kernel exceeds."""
    what = f"{row['kernel']} on sm_{row['arch']} in {row['dtype']} ({row['config']}; {row['call']})"
    if "error" in row:
        return [f"{what} does not compile: {row['error']}"]
    limit, said = MULTIPROCESSORS[row["arch"]].block_shared, []
    if row["spills"]:
        said.append(f"{what} spills {row['spills']} bytes of registers per thread; no spills are allowed")
    if row["registers"] > MAX_REGISTERS:
        said.append(f"{what} takes {row['registers']} registers; the limit is {MAX_REGISTERS}")
    if row["shared"] > limit:
        said.append(f"{what} takes {row['shared']} bytes of shared memory; the limit is {limit}")
    elif not row["occupancy"]:
        said.append(f"{what} does not fit on a multiprocessor: {row['warps']} warps of {row['registers']} registers")
    if row["dots"] and not row["tensor_cores"]:
        said.append(f"{what} has {row['dots']} products but no tensor core instruction")
    return said


def worse(rows: Iterable[dict[str, Any]], recorded: dict[str, Any]) -> list[str]:
    """Return a sentence for each kernel that is worse than recorded, none if the compiler's version differs."""
    if recorded["triton"] != triton.__version__:
        return []
    names = ("kernel", "arch", "dtype", "call", "config")
    known = {tuple(row[n] for n in names): row for row in recorded["rows"]}
    said: list[str] = []
    for row in rows:
        if "error" not in row:
            before = known.get(tuple(row[n] for n in names))
            said += _worse(row, before) if before else [
                f"{row['kernel']} on sm_{row['arch']} ({row['config']}; {row['call']}) is not in the recorded results; "
                "run `make kernels-check`"
            ]  # fmt: skip
    return said


def _worse(row: dict[str, Any], before: dict[str, Any]) -> Iterator[str]:
    what = f"{row['kernel']} on sm_{row['arch']} in {row['dtype']} ({row['config']}; {row['call']})"
    if row["spills"] > before["spills"]:
        yield f"{what} spills {row['spills']} bytes instead of {before['spills']}"
    if row["occupancy"] < before["occupancy"]:
        yield f"{what} has an occupancy of {row['occupancy']:.0%} instead of {before['occupancy']:.0%}"
    for gone in set(before["tensor_cores"]) - set(row["tensor_cores"]):
        yield f"{what} no longer uses {gone}"
