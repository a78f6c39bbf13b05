"""`ggft doctor`: what this machine and this installation can do, and what to do where they cannot.

With `--graph` it opens a model and lists every kind of node that training computes on it, and
whether the device supports that.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ggft import __version__
from ggft.engine.engine import Engine, find_device, kernel_set, load_native
from ggft.engine.metal import metal_rules
from ggft.gguf.read import check_decoder, check_model, read_gguf
from ggft.hub.download import find_model
from ggft.llama.library import library_info
from ggft.settings.commands import DoctorConfig
from ggft.settings.training import BenchConfig
from ggft.setup.open import lora_to_train, make_shape, plan_rows, usual_factor
from ggft.system.errors import EXIT_OK, EXIT_RESOURCE, GgftError, ResourceError
from ggft.system.machine import available_bytes, memory_bytes, physical_cores
from ggft.system.text import format_bytes, printable

LOW_MEMORY_BYTES = 1_500_000_000
LOW_DISK_BYTES = 1_000_000_000
GRAPH_DROPOUT = 0.1  # any but 0, so that the nodes of dropout are there, too


@dataclass
class Findings:
    """What was looked at, and what is wrong with it."""

    facts: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def check(self, name: str, what: Callable[[], Any]) -> Any:
        """Note a fact; a GgftError is recorded as a problem, with its remedy."""
        try:
            value = what()
        except GgftError as error:
            self.problems.append(f"{name}: {error}")
            value = None
        self.facts[name] = value
        return value


def examine() -> Findings:
    """Look at everything but a model."""
    found = Findings()
    found.facts["ggft"] = __version__
    found.facts["python"] = f"{platform.python_version()} ({sys.executable})"
    found.facts["system"] = f"{platform.system()} {platform.release()}, {platform.machine()}"
    found.facts["cores"] = physical_cores()
    found.facts["memory_bytes"] = memory_bytes()
    found.facts["memory_free_bytes"] = available_bytes()
    found.facts["disk_free_bytes"] = shutil.disk_usage(Path.cwd()).free
    found.facts["compiler"] = _compiler()
    found.check("llama_cpp", library_info)
    found.check("native", _native_info)
    found.check("kernels", kernel_set)
    devices = found.check("devices", _devices) or []
    _judge(found, devices)
    return found


def _judge(found: Findings, devices: list[dict[str, Any]]) -> None:
    facts = found.facts
    if facts["compiler"] is None:
        remedy = (
            "xcode-select --install"
            if platform.system() == "Darwin"
            else "install your system's g++ or clang"
        )
        found.warnings.append(f"no C++ compiler: `make setup` will need one ({remedy})")
    if facts["memory_free_bytes"] < LOW_MEMORY_BYTES:
        found.warnings.append("little memory is free: close other programs before training")
    if facts["disk_free_bytes"] < LOW_DISK_BYTES:
        found.warnings.append("little disk space is free here: runs and models need some")
    for device in devices:
        if not device.get("trains", True):
            found.warnings.append(
                f"device {device['name']} lacks operations of training: `--device auto` passes it"
            )
    if platform.system() != "Darwin":
        return
    if platform.machine() == "x86_64" and _is_apple_silicon():
        found.problems.append(
            "this Python runs under Rosetta: install an arm64 one, then make clean setup"
        )
    elif not any(device["type"] != "cpu" for device in devices):
        found.warnings.append(
            "llama.cpp sees no Metal device: training runs on the CPU (make clean setup rebuilds)"
        )


def _is_apple_silicon() -> bool:
    result = subprocess.run(
        ["/usr/sbin/sysctl", "-n", "hw.optional.arm64"], capture_output=True, text=True, check=False
    )
    return result.stdout.strip() == "1"


def _compiler() -> str | None:
    """Return the first line of the C++ compiler's version, None without a working one."""
    name = os.environ.get("CXX") or next(
        (c for c in ("c++", "g++", "clang++") if shutil.which(c)), ""
    )
    if not name:
        return None
    try:
        result = subprocess.run(
            [*name.split(), "--version"], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return result.stdout.partition("\n")[0] or name


def _native_info() -> dict[str, Any]:

    return dict(load_native().build_info())


def _devices() -> list[dict[str, Any]]:
    return [dict(device) for device in load_native().devices()]


def _is_by_rules(device: str) -> bool:
    """Return whether Metal is meant where there is none: its rules are known anywhere."""
    return device.lower() == "metal" and platform.system() != "Darwin"


def graph_rows(model: str, device: str) -> list[dict[str, Any]]:
    """Return what the training graphs of a model consist of: op, types, count, supported.

    Where there is no Metal, device "metal" means Metal's rules for the installed llama.cpp.

    Raises:
        InputError: The model cannot be used.
        ResourceError: The device is not there, or does not support a node.
    """
    file = read_gguf(find_model(model))
    info = check_decoder(file, "ggft doctor --graph")
    by_rules = _is_by_rules(device)
    config = BenchConfig(
        device="cpu" if by_rules else device, kernels="ggml" if by_rules else "auto"
    )
    lora = lora_to_train(config, info, config.rank, usual_factor())
    plan = plan_rows(config, make_shape(config, lora, file, info), n_tokens=128, max_rows=1)
    settings = replace(plan.settings, dropout=GRAPH_DROPOUT, prepacked_bytes=0)
    with Engine(settings) as engine:
        report = engine.graph_report(gpu=by_rules)
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for node in report:
        types = f"{node['type']} <- {' '.join(s['type'] for s in node['sources'])}"
        row = {"op": node["op"], "types": types, "count": 0, "supported": True}
        row = rows.setdefault((node["op"], types), row)
        row["count"] += node["count"]
        row["supported"] &= metal_rules().supports(node) if by_rules else node["supported"]
    return list(rows.values())


def doctor(config: DoctorConfig) -> int:
    """Print the findings; return 3 if something must be fixed before training, else 0.

    Raises:
        InputError: GGFT_ISA names no instruction set that this machine runs.
    """
    with contextlib.suppress(ResourceError):  # a finding
        load_native()
    found = examine()
    if config.device != "auto" and not _is_by_rules(config.device):
        found.check("device", lambda: find_device(config.device))
    if config.graph:
        model = str(find_model(config.model))
        check_model(read_gguf(model))
        found.check("graph", lambda: graph_rows(model, config.device))
        for row in found.facts["graph"] or ():
            if not row["supported"]:
                found.problems.append(f"unsupported on this device: {row['op']} {row['types']}")
    if config.json:
        record = {**found.facts, "problems": found.problems, "warnings": found.warnings}
        print(json.dumps(record, indent=2))
    else:
        print("\n".join(_lines(found)))
    return EXIT_RESOURCE if found.problems else EXIT_OK


def _lines(found: Findings) -> list[str]:
    """Return the findings for people."""
    facts = found.facts
    llama, native = facts["llama_cpp"] or {}, facts["native"] or {}
    lines = [
        f"ggft        {facts['ggft']}",
        f"Python      {facts['python']}",
        f"system      {facts['system']}",
        f"CPU         {facts['cores']} cores; {llama.get('features', 'unknown features')}",
        f"memory      {format_bytes(facts['memory_bytes'])}, "
        f"{format_bytes(facts['memory_free_bytes'])} free",
        f"disk        {format_bytes(facts['disk_free_bytes'])} free here",
        f"compiler    {facts['compiler'] or 'none'}",
        f"llama.cpp   llama-cpp-python {llama.get('package', '-')} in {llama.get('folder', '-')}",
        f"engine      ggml {native.get('ggml_loaded', '-')} loaded, "
        f"built with {native.get('ggml_built', '-')}",
    ]
    if facts["kernels"]:
        lines.append(
            f"kernels     {facts['kernels']['isa']}: products of {facts['kernels']['products']} "
            f"(GGFT_ISA: {', '.join(facts['kernels']['runnable'])})"
        )
    for device in facts["devices"] or ():
        lines.append(
            f"device      {device['name']}: {device['description']}, {device['type']}, "
            f"{format_bytes(device['memory_free'])} of {format_bytes(device['memory_total'])} free"
        )
    for row in facts.get("graph") or ():
        verdict = "supported" if row["supported"] else "NOT SUPPORTED"
        lines.append(f"node        {row['op']}, {row['types']}: {row['count']} times, {verdict}")
    lines += [f"warning     {text}" for text in found.warnings]
    lines += [f"problem     {text}" for text in found.problems]
    lines.append("Ready to train." if not found.problems else "Fix the problems first.")
    return [printable(line) for line in lines]
