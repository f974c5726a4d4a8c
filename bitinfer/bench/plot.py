"""Draw results: time and ratio against the number of tokens, and a roofline. Needs matplotlib.

Works on what :meth:`BenchReport.to_dict` gives, hence also on the JSON of an earlier run.
"""

from pathlib import Path
from typing import Any

from bitinfer.bench.report import MATRIX_OPS

DENSE = ("F.linear fp16", "F.linear bf16")  # torch's own product, on a GPU and on a CPU
OURS = (
    "sign_gemm fp16",
    "sign_gemm bf16",
    "sign_gemm fp32",
    "popcount_gemm int8",
    "popcount_gemm int4",
    "popcount_gemm int1",
    "binary_linear int8",
)
Rows = list[dict[str, Any]]


def name(row: dict[str, Any]) -> str:
    """Return the name of a row's series."""
    return f"{row['op']} {row['activations']}"


def intensity(row: dict[str, Any]) -> float:
    """Return operations per byte of packed weight: how much work each byte read from memory gives."""
    return 2 * row["m"] * row["n"] * row["k"] / row["weight_bytes"]


def by_shape(result: dict[str, Any]) -> dict[tuple[int, int], Rows]:
    """Return the products of each shape, in the order that they were measured."""
    shapes: dict[tuple[int, int], Rows] = {}
    for row in result["measurements"]:
        if row["tops"] is not None:
            shapes.setdefault((row["n"], row["k"]), []).append(row)
    return shapes


def series(rows: Rows) -> dict[str, Rows]:
    """Return the rows of each series by tokens: ours that are drawn, then the peers."""
    lines: dict[str, Rows] = {key: [] for key in OURS}
    for row in sorted(rows, key=lambda row: row["m"]):
        if row["op"] not in MATRIX_OPS or name(row) in lines:
            lines.setdefault(name(row), []).append(row)
    return {key: line for key, line in lines.items() if line}


def figure_names(result: dict[str, Any], stem: str) -> list[str]:
    """Return the names of the figures that a result gives: sweeps of shapes with three numbers of tokens or more."""
    sweeps = [f"{stem}-sweep-{n}x{k}.png" for (n, k), rows in by_shape(result).items() if _is_sweep(rows)]
    return [*sweeps, f"{stem}-roofline.png"] if by_shape(result) else []


def plot(result: dict[str, Any], folder: Path, stem: str, sweeps: bool = True) -> list[Path]:
    """Write the figures of a result into ``folder``, the roofline alone without ``sweeps``; return their paths.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import use
    except ImportError as error:
        raise ImportError("plots need matplotlib: pip install matplotlib") from error
    use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for (n, k), rows in by_shape(result).items():
        if sweeps and _is_sweep(rows):
            paths.append(folder / f"{stem}-sweep-{n}x{k}.png")
            _sweep(result, rows, f"{n} x {k}", paths[-1])
    if by_shape(result):
        paths.append(folder / f"{stem}-roofline.png")
        _roofline(result, paths[-1])
    return paths


def _is_sweep(rows: Rows) -> bool:
    return len({row["m"] for row in rows}) >= 3


def _sweep(result: dict[str, Any], rows: Rows, shape: str, path: Path) -> None:
    from matplotlib import pyplot

    figure, (times, ratios) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    dense = next((key for key in DENSE if key in series(rows)), DENSE[0])
    for label, line in series(rows).items():
        ours = line[0]["op"] in MATRIX_OPS
        style = {"marker": "o" if ours else "x", "linestyle": "-" if ours else "--", "markersize": 4}
        times.plot([r["m"] for r in line], [r["median_us"] for r in line], label=label, **style)
        compared = [r for r in line if dense in r["ratios"]]
        if compared:
            ratios.plot([r["m"] for r in compared], [r["ratios"][dense] for r in compared], label=label, **style)
    ratios.axhline(1, color="grey", linewidth=1)
    times.set(title=f"{shape}: time of a call", ylabel="microseconds")
    ratios.set(title=f"{shape}: times faster than {dense}", ylabel="ratio")
    for axes in (times, ratios):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xlabel("tokens M")
        axes.grid(alpha=0.3, which="both")
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize=8)
    figure.suptitle(result["machine"]["device_name"])
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _roofline(result: dict[str, Any], path: Path) -> None:
    from matplotlib import pyplot

    rows = [row for rows in by_shape(result).values() for row in rows if row["op"] in MATRIX_OPS]
    rows = rows or [row for rows in by_shape(result).values() for row in rows]
    figure, axes = pyplot.subplots(figsize=(9, 6), layout="constrained")
    for label, line in series(rows).items():
        axes.plot([intensity(r) for r in line], [r["tops"] for r in line], "o", markersize=4, label=label)
    low, high = min(map(intensity, rows)), max(map(intensity, rows))
    peaks: dict[str, float] = result["machine"].get("peak_tops", {})
    for activations in ("int1", "int4", "int8", "fp16"):
        if activations in peaks:
            axes.axhline(peaks[activations], color="grey", linewidth=0.8)
            axes.text(low, peaks[activations], f"{activations} {peaks[activations]:,.0f}", fontsize=8, va="bottom")
    bandwidth = result["bandwidth_gb_per_s"] / 1e3  # TB/s: times operations per byte it is TOPS
    top = max(peaks.values()) if peaks else 1.5 * max(row["tops"] for row in rows)
    end = min(high, top / bandwidth)
    axes.plot([low, end], [low * bandwidth, end * bandwidth], color="black", linewidth=1, label="memory read")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set(xlabel="operations per byte of packed weight", ylabel="TOPS", title=result["machine"]["device_name"])
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
