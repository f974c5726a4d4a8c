"""doctor: what was built, what runs and why not are told apart, and every problem has its next step."""

import json

import pytest
import torch

from bitinfer import doctor
from bitinfer.backends.reference import ReferenceBackend
from bitinfer.dispatch import BACKENDS
from bitinfer.doctor import diagnose, read_build_record, self_test


class Broken(ReferenceBackend):
    """Like the reference, but one of its ops is off. Names differ, since the choice of a backend is cached by name."""

    name = "broken"

    def sign_gemm(self, *args):
        return super().sign_gemm(*args) * 1.01


class BrokenIntegers(ReferenceBackend):
    name = "broken-integers"

    def popcount_gemm(self, *args):
        return super().popcount_gemm(*args) + 1e-3


class Raises(ReferenceBackend):
    name = "raises"

    def sign_gemm(self, *args):
        raise RuntimeError("no such instruction\nand more lines")


@pytest.fixture
def record(tmp_path, monkeypatch):
    """Write a build record and take the compiled backends away, as an installation without them has none."""

    def write(cpu: str | None = "not there", **values):
        path = tmp_path / "_build.json"
        path.write_text(json.dumps({"version": None, "native": cpu is None, **values}))
        monkeypatch.setattr(doctor, "read_build_record", lambda: read_build_record(path))
        monkeypatch.setattr(BACKENDS["cpu"], "unavailable", lambda: cpu)
        monkeypatch.setattr(doctor, "LIBRARY", tmp_path / "none.so")
        monkeypatch.setattr(BACKENDS["cuda"], "library_failure", "not there")
        monkeypatch.setattr(doctor, "_check_backend", lambda name, report: doctor.BackendState(name, True, None))
        return {p["problem"]: p["next_step"] for p in diagnose().problems}, diagnose()

    return write


def test_this_installation():
    found = diagnose()
    assert found.healthy, found.problems
    states = {backend.name: backend for backend in found.backends}
    assert states["reference"].self_test["cpu"] == "passed"
    cpu = BACKENDS["cpu"].unavailable()
    cuda = BACKENDS["cuda"].library_failure
    assert states["cpu"].available == (cpu is None)
    assert found.install == ("pure python" if cpu is not None else "cpu only" if cuda is not None else "full")
    if BACKENDS["cuda"].unavailable() is None:
        assert states["cuda"].self_test == {"cuda": "passed"} and states["reference"].self_test["cuda"] == "passed"
    if cpu is None:
        assert states["cpu"].self_test == {"cpu": "passed"}
        assert found.active_instruction_set in [isa["name"] for isa in found.instruction_sets if isa["supported"]]
    assert found.versions["torch"] == torch.__version__
    assert json.loads(json.dumps(found.to_dict()))["healthy"] is True


@pytest.mark.parametrize(
    ("reason", "step"),
    [
        ("no C++ compiler was found (looked for c++)", "install a C++ compiler"),
        (
            "BITINFER_NO_NATIVE was set when it was built",
            "build without that variable: BITINFER_NO_NATIVE=0 pip install",
        ),
        ("ninja was not found: pip install ninja", "mend that, then run: pip install"),
        (None, "build them: pip install"),
    ],
)
def test_why_there_are_no_kernels(record, reason, step):
    problems, found = record(native_reason=reason, cuda_reason=reason)
    assert found.install == "pure python" and found.healthy
    (text,) = [p for p in problems if "no CPU kernels" in p]
    assert (reason or "not built") in text and problems[text].startswith(step)
    assert found.libraries["CPU kernels"] == f"no: {reason or 'not there'}"


def test_built_but_not_loading_is_serious(record):
    problems, found = record(cpu="undefined symbol", native=True)
    assert not found.healthy
    assert any("built but do not load: undefined symbol" in p for p in problems)


@pytest.mark.parametrize(
    ("reason", "step"),
    [
        ("BITINFER_CUDA=0 was set when it was built", "with nvcc on the PATH"),
        ("no nvcc was found when it was built", "with nvcc on the PATH"),
    ],
)
def test_a_gpu_without_kernels(record, monkeypatch, reason, step):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    problems, found = record(cpu=None, cuda=False, cuda_reason=reason)
    assert found.install == "cpu only" and found.libraries["CUDA kernels"] == f"no: {reason}"
    (text,) = [p for p in problems if "torch sees a GPU" in p]
    assert reason in text and problems[text].startswith(step)


def test_libraries_of_another_version(record):
    problems, found = record(cpu=None, version="0.0.1")
    assert not found.healthy and any("are of bitinfer 0.0.1" in p for p in problems)


@pytest.mark.parametrize(
    ("backend", "failure"),
    [(Broken, "sign_gemm is off by"), (BrokenIntegers, "popcount_gemm differs"), (Raises, "no such instruction")],
)
def test_a_wrong_backend_fails_its_self_test(monkeypatch, backend, failure):
    name = backend.name
    monkeypatch.setitem(BACKENDS, name, backend())
    assert failure in str(self_test(name)) and "\n" not in str(self_test(name))
    assert self_test("reference") is None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(doctor, "DEVICES", {**doctor.DEVICES, name: ("cpu",)})
    found = diagnose()
    assert not found.healthy and any(f"{name} on cpu fails its self-test" in p["problem"] for p in found.problems)


@pytest.mark.parametrize(
    ("variable", "value", "problem", "healthy"),
    [
        ("BITINFER_BACKEND", "nonsense", "there is none of that name; known are", False),
        ("BITINFER_BACKEND", "reference", "forces the slow path", True),
    ],
)
def test_variables_that_force_things(monkeypatch, variable, value, problem, healthy):
    monkeypatch.setenv(variable, value)
    found = diagnose()
    assert found.variables[variable] == value and found.healthy is healthy
    assert any(problem in p["problem"] and p["next_step"] == f"unset {variable}" for p in found.problems)


def test_old_versions_are_serious(monkeypatch):
    real = doctor._version
    monkeypatch.setattr(doctor, "_version", lambda name: {"torch": "2.9.1+cpu", "triton": None}.get(name, real(name)))
    (problem,) = [p for p in diagnose().problems if "torch 2.9.1" in p["problem"]]
    assert problem["serious"] and problem["next_step"] == 'pip install "torch>=2.10"'


def test_records_that_cannot_be_read(tmp_path):
    assert read_build_record(tmp_path / "none.json") == {}
    for text in ("", "[1]", "{"):
        (tmp_path / "bad.json").write_text(text)
        assert read_build_record(tmp_path / "bad.json") == {}
