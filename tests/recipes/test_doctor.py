from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from ggft.engine.engine import kernel_set, load_native
from ggft.recipes import doctor as module
from ggft.recipes.doctor import doctor, examine
from ggft.settings.commands import DoctorConfig
from ggft.system.errors import ResourceError
from tests.support.models import spec_for, write_model


def test_this_machine_is_described() -> None:
    found = examine()
    assert found.problems == []
    facts = found.facts
    assert facts["llama_cpp"]["package"] == "0.3.36"
    assert Path(facts["llama_cpp"]["folder"]).name == "llama_cpp"
    assert facts["native"]["ggml_loaded"] == facts["native"]["ggml_built"]
    assert "CPU" in [device["name"] for device in facts["devices"]]
    assert 0 < facts["memory_free_bytes"] <= facts["memory_bytes"]
    assert facts["cores"] >= 1
    assert facts["kernels"]["isa"] in facts["kernels"]["runnable"]


def test_people_and_programs_can_read_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(DoctorConfig()) == 0
    text = capsys.readouterr().out
    assert text.splitlines()[-1] == "Ready to train."
    assert f"kernels     {kernel_set()['isa']}: " in text
    assert doctor(DoctorConfig(json=True)) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["problems"] == []
    assert record["ggft"] in text


def test_a_broken_engine_is_a_problem_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> Any:
        raise ResourceError("built for another ggml", hint="make setup")

    monkeypatch.setattr("ggft.recipes.doctor.load_native", broken)
    assert doctor(DoctorConfig()) == 3
    text = capsys.readouterr().out
    assert "native: built for another ggml\n  → make setup" in text
    assert text.splitlines()[-1] == "Fix the problems first."


@pytest.mark.parametrize(
    ("facts", "says"),
    [
        ({"compiler": None}, "no C++ compiler"),
        ({"memory_free_bytes": 10**9}, "little memory is free"),
        ({"disk_free_bytes": 10**8}, "little disk space"),
    ],
)
def test_warnings(facts: dict[str, Any], says: str) -> None:
    found = examine()
    found.warnings.clear()
    found.facts |= {"compiler": "c++ 1", "memory_free_bytes": 8e9, "disk_free_bytes": 8e9} | facts
    module._judge(found, [{"type": "gpu"}])
    assert [says in text for text in found.warnings] == [True]


def test_a_device_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor(DoctorConfig(device="Mars")) == 3
    assert "there is no such device (found 'Mars'" in capsys.readouterr().out
    assert doctor(DoctorConfig(device="cpu")) == 0


@pytest.mark.parametrize(
    ("machine", "arm64", "devices", "problem", "warning"),
    [
        ("arm64", "1", [{"type": "gpu"}], None, None),
        ("arm64", "1", [{"type": "cpu"}], None, "no Metal device"),
        ("x86_64", "1", [{"type": "cpu"}], "under Rosetta", None),
        ("x86_64", "0", [{"type": "gpu"}], None, None),
    ],
)
def test_a_mac(
    machine: str,
    arm64: str,
    devices: list[dict[str, Any]],
    problem: str | None,
    warning: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found = examine()
    found.warnings.clear()
    found.facts |= {"compiler": "c++ 1", "memory_free_bytes": 8e9, "disk_free_bytes": 8e9}
    monkeypatch.setattr("platform.system", lambda: "Darwin")
    monkeypatch.setattr("platform.machine", lambda: machine)
    answer = subprocess.CompletedProcess([], 0, stdout=f"{arm64}\n")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: answer)
    module._judge(found, devices)
    assert [problem in text for text in found.problems if problem] == [True] * bool(problem)
    assert [warning in text for text in found.warnings if warning] == [True] * bool(warning)
    assert len(found.problems) == bool(problem)
    assert len(found.warnings) == bool(warning)


def test_the_graph_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = str(write_model(tmp_path / "tiny.gguf", spec_for("Q4_0")).path)
    config = DoctorConfig(graph=True, model=model, device="cpu", json=True)
    assert doctor(config) == 0
    rows = json.loads(capsys.readouterr().out)["graph"]
    assert set(rows[0]) == {"op", "types", "count", "supported"}
    assert all(row["supported"] for row in rows)
    assert doctor(DoctorConfig(graph=True, model=model, device="cpu")) == 0
    assert capsys.readouterr().out.count("node   ") == len(rows)


def test_metal_is_judged_by_its_rules_anywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("platform.system", lambda: "Linux")
    model = str(write_model(tmp_path / "tiny.gguf", spec_for("Q4_0")).path)
    config = DoctorConfig(graph=True, model=model, device="metal")
    assert doctor(config) == 0
    out = capsys.readouterr().out
    assert "MUL_MAT, f32 <- q4_0 f32" in out, "the product that a GPU computes"
    assert "CUSTOM" not in out
    monkeypatch.setattr(
        "ggft.engine.metal.MetalRules.supports", lambda _, node: node["op"] != "ROPE"
    )
    assert doctor(config) == 3
    assert "unsupported on this device: ROPE f32 <- f32 i32" in capsys.readouterr().out


def test_an_unsupported_node_is_a_problem(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = str(write_model(tmp_path / "tiny.gguf", spec_for("Q4_0")).path)
    load_native().deny_family("ADD")
    try:
        assert doctor(DoctorConfig(graph=True, model=model, device="cpu")) == 3
    finally:
        load_native().deny_family("")
    assert "ADD" in capsys.readouterr().out
