"""A head in 8 bits on the GPU: the op against float64 and against exact integers, in graphs, and in a model's loop."""

from typing import Any

import pytest
import torch
from cuda_problems import fresh_seed, poisoned, require_cuda
from packed_models import llama, pack
from torch import Tensor, nn

from bitinfer.int8_rows import RowsLinear, restore_rows, round_rows
from bitinfer.models import fuse
from bitinfer.models import generation as loop
from bitinfer.testing.problems import FBI

require_cuda()

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
TOKENS = (*range(10), 16, 17, 33)
# V, K: whole chunks of 64 and parts of one, rows that 16 bytes divide and others, whole and part blocks of 32 rows
SHAPES = [
    (1, 8),
    (1, 4096),
    (3, 16),
    (7, 15),
    (31, 1),
    (33, 64),
    (40, 200),
    (64, 48),
    (65, 768),
    (17, 2048),
    (5, 1040),
    (1000, 4096),
    (129, 11008),
    (32000, 768),
    (2, 0),
    (0, 8),
]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def rows_linear(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    torch.cuda.synchronize()
    y: Tensor = poisoned(lambda: torch.ops.bitinfer_native.rows_linear(x, codes, scale))
    assert y.shape == (*x.shape[:-1], len(codes)) and y.dtype == x.dtype
    return y


def random_codes(v: int, k: int) -> tuple[Tensor, Tensor]:
    return torch.randint(-128, 128, (v, k), device="cuda").char(), torch.rand(v, device="cuda") * 0.01


def check(y: Tensor, x: Tensor, codes: Tensor, scale: Tensor) -> None:
    """Compare with float64: a rounding to the dtype, and sums in float32, those of 64 columns with truncation."""
    wide, rows = x.double(), (codes.double() * scale.double().unsqueeze(1)).t()
    exact, magnitude = wide @ rows, wide.abs() @ rows.abs()
    info = torch.finfo(y.dtype)
    sums = (x.shape[-1] / 256 + 32) * 2.0**-24 * magnitude
    assert ((y.double() - exact).abs() <= info.eps * exact.abs() + sums + info.smallest_normal * info.eps).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("v", "k"), SHAPES)
def test_the_op_against_float64(v: int, k: int, dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed())
    codes, scale = random_codes(v, k)
    for m in TOKENS:
        x = torch.randn(m, k, device="cuda").to(dtype)
        check(rows_linear(x, codes, scale), x, codes, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("v", "k"), SHAPES)
def test_integers_are_exact(v: int, k: int, dtype: torch.dtype) -> None:
    """Sums of small integers have no rounding: one column that is left out or counted twice shows."""
    torch.manual_seed(fresh_seed())
    codes, scale = random_codes(v, k)
    for m in TOKENS:
        x = torch.randint(-3, 4, (m, k), device="cuda").to(dtype)
        exact = x.double() @ codes.double().t()
        assert torch.equal(rows_linear(x, codes, scale), (exact.float() * scale).to(dtype)), m


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_code(dtype: torch.dtype) -> None:
    codes = torch.arange(-128, 128, device="cuda").char().unsqueeze(1) * torch.eye(16, device="cuda").char().repeat(
        16, 1
    )
    y = rows_linear(torch.ones(1, 16, device="cuda", dtype=dtype), codes, torch.ones(256, device="cuda"))
    assert torch.equal(y[0].float(), torch.arange(-128.0, 128.0, device="cuda"))


def test_floats_keep_their_24_bits() -> None:
    torch.manual_seed(fresh_seed())
    x = torch.randn(8, 64, device="cuda") * 2.0 ** torch.randint(-90, 90, (8, 64), device="cuda")
    codes = torch.eye(64, device="cuda").char()
    assert torch.equal(rows_linear(x, codes, torch.ones(64, device="cuda")), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_memory_of_any_layout(dtype: torch.dtype) -> None:
    """Rows of x that are apart, with NaN between them, and tensors that begin at odd addresses."""
    torch.manual_seed(fresh_seed())
    for k in (128, 200):
        for m in (1, 3, 9):
            codes, scale = random_codes(70, k)
            for gap in (8, 16, 3):
                x = torch.full((m, k + gap), float("nan"), device="cuda", dtype=dtype)[:, :k]
                x.copy_(torch.randn(m, k, device="cuda"))
                check(rows_linear(x, codes, scale), x, codes, scale)
            x = torch.randn(m * k + 1, device="cuda").to(dtype)[1:].view(m, k)
            check(rows_linear(x, codes, scale), x, codes, scale)
            odd = torch.zeros(70 * k + 1, device="cuda", dtype=torch.int8)[1:].view(70, k).copy_(codes)
            check(rows_linear(x, odd, scale), x, codes, scale)
            check(rows_linear(x, codes.t().contiguous().t(), scale), x, codes, scale)
            batched = x.clone().view(1, m, k)
            check(rows_linear(batched, codes, scale), batched, codes, scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tokens_do_not_see_each_other(dtype: torch.dtype) -> None:
    torch.manual_seed(fresh_seed())
    codes, scale = random_codes(100, 320)
    x = torch.randn(13, 320, device="cuda").to(dtype)
    y = rows_linear(x, codes, scale)
    assert torch.equal(rows_linear(x, codes, scale), y)
    x[4, 17] = float("nan")
    bad = rows_linear(x, codes, scale)
    assert bad[4].isnan().all()
    others = [t for t in range(13) if t != 4]
    assert torch.equal(bad[others], y[others])


@pytest.mark.parametrize("m", [1, 8, 9])
def test_in_a_graph(m: int) -> None:
    torch.manual_seed(fresh_seed())
    head = RowsLinear(torch.randn(1000, 256, device="cuda"))
    x = torch.randn(m, 256, device="cuda").half()
    head(x)  # CUDA loads a kernel when it first runs
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = head(x * 2)  # behind a kernel that writes its input
    for _ in range(3):
        x.normal_()
        y.fill_(float("nan"))
        graph.replay()
        assert torch.equal(y, head(x * 2))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"codes": torch.zeros(4, 9).char().cuda()}, "codes must be"),
        ({"codes": torch.zeros(4, 8).cuda()}, "int8"),
        ({"codes": torch.zeros(4, 8).char()}, "codes must be on GPU 0"),
        ({"scale": torch.ones(3).cuda()}, "scale must have 4"),
        ({"scale": torch.ones(4).half().cuda()}, "float32"),
        ({"scale": torch.ones(4)}, "scale must be on GPU 0"),
        ({"x": torch.ones(2, 8).int().cuda()}, "float"),
    ],
)
def test_bad_arguments(change: dict[str, Tensor], says: str) -> None:
    codes = torch.zeros(4, 8, device="cuda", dtype=torch.int8)
    arguments = {"x": torch.ones(2, 8, device="cuda"), "codes": codes, "scale": torch.ones(4, device="cuda"), **change}
    with pytest.raises(RuntimeError, match=says):
        torch.ops.bitinfer_native.rows_linear(*arguments.values())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)  # float32 goes through the layers in torch
@pytest.mark.parametrize("batch", [1, 3, 9])
def test_a_model_with_such_a_head(batch: int, dtype: torch.dtype) -> None:
    """The tokens of the same model with the rounded head as a matrix, up to a tie within rounding."""
    sizes = {"vocab_size": 1000, "hidden_size": 256, "intermediate_size": 640, "head_dim": 64}

    def made() -> Any:
        return pack(llama(**sizes, max_position_embeddings=256), FBI, dtype=dtype).cuda()

    model, rounded = fuse(made(), head_bits=8), made()
    assert isinstance(loop._decoders[model].head, RowsLinear)
    weight = restore_rows(*round_rows(rounded.lm_head.weight.detach())).to(dtype)
    rounded.lm_head.weight = nn.Parameter(weight, requires_grad=False)
    fuse(rounded)
    torch.manual_seed(fresh_seed())
    ids = torch.randint(3, 1000, (batch, 9), device="cuda")
    options = {"max_new_tokens": 48, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    for ours, theirs in zip(model.generate(ids, **options), rounded.generate(ids, **options), strict=True):
        if torch.equal(ours, theirs):
            continue
        at = int((ours != theirs).nonzero()[0])
        logits = rounded(ours[None, :at]).logits[0, -1].float()
        gap = (logits.max() - logits[torch.stack((ours[at], theirs[at]))].min()).item()
        assert gap <= 0.05 * logits.std().item(), f"differs at {at} by {gap}"
