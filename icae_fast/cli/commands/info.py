"""`icae-fast info`."""

from __future__ import annotations

import json
from typing import Any

from rich.table import Table

from icae_fast.cli.options import AsJson
from icae_fast.cli.output import print_table


def info(as_json: AsJson = False) -> None:
    """Show versions, device, CPU features, instruction sets, and the backend of each op."""
    from icae_fast.info import collect_info

    facts = collect_info()
    if as_json:
        print(json.dumps(facts))
        return
    print_table(_machine_table(facts))
    ops = Table("op", "cpu", "cuda")
    for name, by_device in facts["ops"].items():
        ops.add_row(name, by_device["cpu"], by_device["cuda"])
    print_table(ops)


def _machine_table(facts: dict[str, Any]) -> Table:
    table = Table("", "", show_header=False)
    for name, version in facts["versions"].items():
        table.add_row(name, version or "not installed")
    cpu = facts["cpu"]
    table.add_section()
    table.add_row("device", facts["device"])
    table.add_row("cpu", f"{cpu['model']}, {cpu['cores']} cores, {cpu['threads']} threads")
    table.add_row("C++ kernels", facts["extension"])
    if cpu["isa"]:
        table.add_row("instruction set", cpu["isa"])
        table.add_row("sets in this build", ", ".join(cpu["build"]["isas"]))
        table.add_row("sets this CPU runs", ", ".join(cpu["runnable_isas"]))
        table.add_row("CPU features", ", ".join(cpu["features"]))
    return table
