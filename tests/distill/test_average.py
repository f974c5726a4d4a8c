"""Averages of latent checkpoints: weights, canonical scales, flipped signs."""

import pytest
import torch

import bitinfer
from bitinfer import FormatError
from bitinfer.distill import average_checkpoints, save_student
from bitinfer.distill.average import source_weights
from bitinfer.distill.models import load_student
from bitinfer.distill.students import latent_signs


def test_weights_of_the_methods():
    assert source_weights("swa", 4) == source_weights("warm", 4) == [0.25] * 4
    assert source_weights("lawa", 5, last=2) == [0, 0, 0, 0.5, 0.5]
    mean, values = 3.0, [3.0, 5.0, 7.0, 1.0]
    for value in values[1:]:
        mean = 0.8 * mean + 0.2 * value
    ema = source_weights("ema", 4, decay=0.8)
    assert sum(w * v for w, v in zip(ema, values, strict=True)) == pytest.approx(mean) and sum(ema) == pytest.approx(1)
    for bad in ({"kind": "mean"}, {"decay": 1.0}, {"last": 0}):
        with pytest.raises(ValueError, match="average"):
            source_weights(**{"kind": "ema", "count": 2, **bad})


@pytest.mark.parametrize("method", ["fbi", "onebit"])
def test_turned_columns_do_not_cancel(method, teacher, student_of, corpus, tmp_path):
    first, second = student_of(teacher, method), student_of(teacher, method)
    turned = total = 0
    for name, parameter in second.named_parameters():
        # (alpha, S) and (-alpha, -S) are the same column: the second model is the first, written differently
        if name.endswith(("wscale", "input_factor", "weight_scale")):
            turn = torch.where(torch.rand(parameter.numel()) < 0.4, -1.0, 1.0)
            parameter.data *= turn.view(parameter.shape)
            weight = second.get_parameter(name.rsplit(".", 1)[0] + ".weight")
            weight.data *= turn.unsqueeze(1) if name.endswith("weight_scale") else turn
            turned, total = turned + int((turn < 0).sum()), total + turn.numel()
    for index, student in enumerate((first, second)):
        save_student(student, tmp_path / str(index))
    report = average_checkpoints([tmp_path / "0", tmp_path / "1"], tmp_path / "m")
    assert report.flipped == [0.0, 0.0] and report.layers == 14 and report.weights == [0.5, 0.5]
    assert report.turned == pytest.approx(turned / (2 * total)) and "turned round" in str(report)
    averaged = load_student(tmp_path / "m")
    for (name, got), wanted in zip(averaged.state_dict().items(), first.state_dict().values(), strict=True):
        torch.testing.assert_close(got, wanted, msg=name)


def test_the_sign_is_taken_of_the_mean(teacher, student_of, tmp_path):
    students = [student_of(teacher) for _ in range(3)]
    torch.manual_seed(1)
    for index, student in enumerate(students):
        for parameter in student.parameters():
            parameter.data += 0.01 * torch.randn_like(parameter) * (parameter.dim() == 2)
        for name, parameter in student.named_parameters():
            if name.endswith("wscale"):
                parameter.data.abs_()
        save_student(student, tmp_path / str(index))
    sources = [tmp_path / str(i) for i in range(3)]
    report = average_checkpoints(sources, tmp_path / "m", method="ema", decay=0.5)
    averaged = load_student(tmp_path / "m")
    weights = (0.25, 0.25, 0.5)
    for name, got in averaged.state_dict().items():
        parts = [student.state_dict()[name] for student in students]
        torch.testing.assert_close(got, sum(w * p for w, p in zip(weights, parts, strict=True)), msg=name)
    signs = latent_signs(averaged)
    for student, flipped in zip(students, report.flipped, strict=True):
        changed = sum(int((a != b).sum()) for a, b in zip(latent_signs(student), signs, strict=True))
        assert flipped == pytest.approx(changed / sum(s.numel() for s in signs)) and 0.01 < flipped < 0.5
    bitinfer.convert(tmp_path / "m", tmp_path / "p")
    with pytest.raises(FileExistsError):
        average_checkpoints(sources, tmp_path / "m")
    assert average_checkpoints(sources, tmp_path / "m", method="lawa", last=1, overwrite=True).flipped[2] == 0


def test_what_cannot_be_averaged(teacher, teacher_folder, student_of, tmp_path):
    save_student(student_of(teacher, "onebit"), tmp_path / "packed", packed=True)
    save_student(student_of(teacher, "onebit"), tmp_path / "latent")
    save_student(student_of(teacher, config={"num_hidden_layers": 1}), tmp_path / "short")
    save_student(student_of(teacher), tmp_path / "fbi")
    for pair, match in (
        (("packed", "packed"), "packed signs, which have no mean"),
        (("latent", "fbi"), "different tensors"),
        (("fbi", "short"), "different tensors"),
    ):
        with pytest.raises(FormatError, match=match):
            average_checkpoints([tmp_path / name for name in pair], tmp_path / "m")
    with pytest.raises(FormatError, match="latent weights"):
        average_checkpoints([teacher_folder, teacher_folder], tmp_path / "m")
    with pytest.raises(ValueError, match="at least two"):
        average_checkpoints([tmp_path / "fbi"], tmp_path / "m")
    assert not (tmp_path / "m").exists()
