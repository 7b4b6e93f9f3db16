"""What a compiled kernel takes of an SM, and what it may take."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MAX_REGISTERS = 255


@dataclass(frozen=True)
class Multiprocessor:
    """What an SM has: bytes of shared memory, those that one block may have, warps and blocks.

    Registers are 64 K of 32 bits, a quarter for each scheduler, given out by 256 to a warp. Source: the table of
    compute capabilities in NVIDIA's CUDA C++ Programming Guide.
    """

    shared: int
    block_shared: int
    warps: int
    blocks: int

    def occupancy(self, registers: int, shared: int, warps: int, tensor_memory: int = 0) -> float:
        """The share of warps that can be on the SM at once.

        Args:
            registers: of a thread; shared: bytes of a block; warps: of a block;
            tensor_memory: columns of a block, of the 512 that sm_100 has.
        """
        of_warp = -(-max(registers, 1) * 32 // 256) * 256
        blocks = min(self.blocks, self.warps // warps, 4 * (16384 // of_warp) // warps)
        blocks = min(blocks, self.shared // (shared + 1024))  # the system takes 1 KB of each block
        if tensor_memory:
            blocks = min(blocks, 512 // tensor_memory)
        return blocks * warps / self.warps


MULTIPROCESSORS = {
    80: Multiprocessor(164 << 10, 163 << 10, 64, 32),
    89: Multiprocessor(100 << 10, 99 << 10, 48, 24),
    90: Multiprocessor(228 << 10, 227 << 10, 64, 32),
    100: Multiprocessor(228 << 10, 227 << 10, 64, 32),
}
# By what PTX tells them. The first two are the names of families: mma.sync and wgmma.mma_async.
_INSTRUCTIONS = {"mma": r"\bmma\.sync", "wgmma": r"\bwgmma\.mma_async", "tcgen05": r"\btcgen05\.mma"}
_NARROW_DOT = re.compile(r"tt\.dot\b[^\n]*:\s*tensor<[0-9x]+x(?:bf16|f16)>")


def inspect(compiled: Any, arch: int) -> dict[str, Any]:
    """Figures of a compiled kernel.

    Returns:
        `warps`, `registers` of a thread, `spills` (bytes of stack and local memory of a thread), `shared` (bytes of a
        block), `occupancy`, `dots` (`tl.dot` of 16-bit factors in the source), `tensor_cores` (the instructions).
    """
    ptx, usage = compiled.asm["ptx"], resource_usage(compiled.asm["cubin"])
    warps = int(re.search(r"\.(?:reqntid|maxntid) (\d+)", ptx)[1]) // 32  # with those that Triton adds
    # What a launch asks for is not in the cubin; what is there is the system's own kilobyte since sm_90.
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
    """What `cuobjdump` says of the one function in a cubin: REG, STACK, SHARED, LOCAL."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(n) for name, n in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}


def complaints(row: dict[str, Any]) -> list[str]:
    """A sentence for each limit that a kernel passes."""
    what = f"{row['kernel']} on sm_{row['arch']} in {row['dtype']} ({row['config']}; {row['call']})"
    if "error" in row:
        return [f"{what} does not compile: {row['error']}"]
    limit, said = MULTIPROCESSORS[row["arch"]].block_shared, []
    if row["spills"]:
        said.append(f"{what} spills {row['spills']} bytes of registers a thread; the limit is none")
    if row["registers"] > MAX_REGISTERS:
        said.append(f"{what} takes {row['registers']} registers; the limit is {MAX_REGISTERS}")
    if row["shared"] > limit:
        said.append(f"{what} takes {row['shared']} bytes of shared memory; the limit is {limit}")
    elif not row["occupancy"]:
        said.append(f"{what} does not fit on a multiprocessor: {row['warps']} warps of {row['registers']} registers")
    if row["dots"] and not row["tensor_cores"]:
        said.append(f"{what} has {row['dots']} products and no tensor core instruction")
    return said


def worse(rows: Iterable[dict[str, Any]], recorded: dict[str, Any]) -> list[str]:
    """A sentence for each kernel that has become worse than it is recorded to be."""
    if recorded["triton"] != triton.__version__:
        return []  # another compiler, another matter: what is left are the limits
    names = ("kernel", "arch", "dtype", "call", "config")
    known = {tuple(row[n] for n in names): row for row in recorded["rows"]}
    said = []
    for row in rows:
        if "error" not in row:
            before = known.get(tuple(row[n] for n in names))
            said += _worse(row, before) if before else [
                f"{row['kernel']} on sm_{row['arch']} ({row['config']}; {row['call']}) is not in the recorded results; "
                "run `make kernels-check`"
            ]  # fmt: skip
    return said


def _worse(row: dict[str, Any], before: dict[str, Any]) -> Sequence[str]:
    what = f"{row['kernel']} on sm_{row['arch']} in {row['dtype']} ({row['config']}; {row['call']})"
    if row["spills"] > before["spills"]:
        yield f"{what} spills {row['spills']} bytes instead of {before['spills']}"
    if row["occupancy"] < before["occupancy"]:
        yield f"{what} has an occupancy of {row['occupancy']:.0%} instead of {before['occupancy']:.0%}"
    for gone in set(before["tensor_cores"]) - set(row["tensor_cores"]):
        yield f"{what} no longer uses {gone}"
