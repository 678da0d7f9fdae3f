"""``report.md`` and its plots, from quality.json alone: what was lost, in which domain, at which layer and length."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from exporter.evaluate import svg
from exporter.evaluate.gates import Gate, kind_of
from exporter.evaluate.quality import QUALITY, Quality
from exporter.stage import write_atomic

REPORT = "report.md"
Metrics = Mapping[str, Any]


def write_report(folder: Path) -> Path:
    """``report.md`` and the plots beside it from ``folder/quality.json``; plots of an earlier report are replaced."""
    quality = Quality.read(folder / QUALITY)
    plots = {name: draw(quality.metrics) for name, draw in _PLOTS.items()}
    for name, text in plots.items():
        path = folder / f"{name}.svg"
        if text:
            _write(path, text)
        else:
            path.unlink(missing_ok=True)
    shown = [name for name, text in plots.items() if text]
    _write(folder / REPORT, "\n".join(_page(quality, shown)))
    return folder / REPORT


def summary_lines(quality: Quality) -> list[str]:
    """A line a gate and the verdict, for a terminal."""
    lines = [
        f"{_verdict(gate):13} {gate.name:26} {_number(gate.measured):>12}  "
        f"({kind_of(gate.name).side} {gate.bound:g})"
        for gate in quality.gates
    ]  # fmt: skip
    return [*lines, _outcome(quality)]


def _write(path: Path, text: str) -> None:
    def write(partial: Path) -> None:
        partial.write_text(text, "utf-8")

    write_atomic(path, write)


def _page(quality: Quality, plots: Sequence[str]) -> Iterable[str]:
    metrics = quality.metrics
    yield from ("# Quality report", "", f"**{_outcome(quality)}**", "", *_lost(metrics), "", "## Gates", "")
    yield from _table(
        ("gate", "measured", "bound", "result", "what it is"),
        [(f"`{g.name}`", _number(g.measured), f"{kind_of(g.name).side} {g.bound:g}", _verdict(g),
          kind_of(g.name).meaning) for g in quality.gates],
    )  # fmt: skip
    yield from _waivers(quality)
    yield from ("", "## By domain", "", *_picture(plots, "kl_by_domain"), *_picture(plots, "perplexity"))
    yield from _domains(metrics)
    yield from ("", "## By layer", "", *_picture(plots, "layers"), *_layers(metrics))
    yield from ("", "## By length", "", *_picture(plots, "lengths"), *_lengths(metrics))
    yield from ("", "## Needles", "", *_picture(plots, "needles"), *_needles(metrics))
    yield from ("", "## Answers", "", *_answers(metrics))
    yield from ("", "## What this was measured with", "", *_provenance(quality), "")


def _outcome(quality: Quality) -> str:
    failed, waived = quality.failed_gates, quality.waived_gates
    good = len(quality.gates) - len(failed) - len(waived)
    verdict = f"{good} of {len(quality.gates)} gates passed"
    if waived:
        verdict += f", {len(waived)} waived ({', '.join(waived)})"
    return verdict + (f"; FAILED: {', '.join(failed)}" if failed else "")


def _verdict(gate: Gate) -> str:
    if gate.passed:
        return "passed"
    found = "not measured" if gate.measured is None else "failed"
    return f"{found}, waived" if gate.waived else found.upper()


def _lost(metrics: Metrics) -> Iterable[str]:
    """What a reader wants to know first, in sentences."""
    total = metrics["total"]
    yield (
        f"Over {total['tokens']:,} tokens the student's most likely next token is the teacher's "
        f"{_share(total['top1'])} of the time; mean KL {_number(total['kl_mean'])} nats (median "
        f"{_number(total['kl_p50'])}, 99 % of tokens below {_number(total['kl_p99'])}); perplexity "
        f"{_number(total['teacher_ppl'])} → {_number(total['student_ppl'])}."
    )
    rated = {name: d for name, d in metrics["domains"].items() if d["ppl_increase"] is not None}
    if len(rated) > 1:
        by_kl = max(rated, key=lambda name: rated[name]["kl_mean"])
        by_ppl = max(rated, key=lambda name: rated[name]["ppl_increase"])
        yield (
            f"Most was lost in `{by_kl}` (KL {_number(rated[by_kl]['kl_mean'])}, top-1 "
            f"{_share(rated[by_kl]['top1'])}); perplexity rises most in `{by_ppl}` "
            f"({_signed(rated[by_ppl]['ppl_increase'])})."
        )
    steps = _steps(metrics["layer_error"])
    if steps:
        worst = max(range(len(steps)), key=lambda layer: steps[layer])
        yield f"The streams leave the teacher's most at layer {worst} (relative error +{_number(steps[worst])})."


def _steps(errors: Sequence[float]) -> list[float]:
    """What each layer adds to the relative error."""
    return [error - before for error, before in zip(errors, [0.0, *errors], strict=False)]


def _waivers(quality: Quality) -> Iterable[str]:
    if quality.waivers:
        yield from ("", "## Waivers", "")
        yield from _table(
            ("gate", "needed", "by", "reason"),
            [(f"`{w.gate}`", "yes" if w.gate in quality.waived_gates else "no: the gate passes", w.by, w.reason)
             for w in quality.waivers],
        )  # fmt: skip


def _domains(metrics: Metrics) -> Iterable[str]:
    rows = [*metrics["domains"].items(), ("all", metrics["total"])]
    head = ("domain", "tokens", "KL mean", "KL p99", "top-1", "teacher ppl", "student ppl", "change")
    return _table(head, [
        (name, f"{d['tokens']:,}", _number(d["kl_mean"]), _number(d["kl_p99"]), _share(d["top1"]),
         _number(d["teacher_ppl"]), _number(d["student_ppl"]), _signed(d["ppl_increase"])) for name, d in rows
    ])  # fmt: skip


def _layers(metrics: Metrics) -> Iterable[str]:
    errors = metrics["layer_error"]
    yield from ("Relative error of the residual streams after each layer, ‖student − teacher‖ / ‖teacher‖.", "")
    yield from _table(("layer", "error", "added here"), [
        (str(layer), _number(error), _signed_number(step))
        for layer, (error, step) in enumerate(zip(errors, _steps(errors), strict=True))
    ])  # fmt: skip


def _lengths(metrics: Metrics) -> Iterable[str]:
    if not metrics["lengths"]:
        return (f"Not measured: {metrics['not_measured'].get('lengths')}.",)
    return _table(("first tokens", "texts", "teacher ppl", "student ppl", "change"), [
        (f"{row['tokens']:,}", str(row["texts"]), _number(row["teacher_ppl"]), _number(row["student_ppl"]),
         _signed(row["ppl_increase"])) for row in metrics["lengths"]
    ])  # fmt: skip


def _needles(metrics: Metrics) -> Iterable[str]:
    rows = metrics["needles"]
    if not rows:
        return (f"Not measured: {metrics['not_measured'].get('needles')}.",)
    note = []
    if not any(row["teacher_found"] for row in rows):
        note = ["The teacher finds none of them, so the recall says nothing here; the log-probabilities do.", ""]
    head = ("length", "depth", "needles", "teacher finds", "student finds", "teacher log p", "student log p")
    return (*note, *_table(head, [
        (f"{row['tokens']:,}", f"{row['depth']:.0%}", str(row["needles"]), str(row["teacher_found"]),
         str(row["student_found"]), _number(row["teacher_logprob"]), _number(row["student_logprob"])) for row in rows
    ]))  # fmt: skip


def _answers(metrics: Metrics) -> Iterable[str]:
    found = metrics["generation"]
    if not found:
        return (f"Not measured: {metrics['not_measured'].get('generation')}.",)
    return _table(("greedy answers", "teacher", "student"), [
        ("answers, tokens each at most", f"{found['answers']}, {found['tokens']}", "same"),
        ("first 32 tokens equal until the first difference", "", _share(found["greedy_agreement"])),
        ("loss on the teacher's answers, nats", _number(found["teacher_nll"]), _number(found["student_nll"])),
        ("answers that loop (over half the 4-grams repeat)", _share(found["teacher_loops"]),
         _share(found["student_loops"])),
    ])  # fmt: skip


def _provenance(quality: Quality) -> Iterable[str]:
    teacher = quality.teacher
    return _table(("what", "which"), [
        ("checkpoint (headers)", f"`{quality.source_sha256}`"), ("student", f"`{quality.recipe_sha256}`"),
        ("teacher", f"`{teacher.get('recipe_sha256')}`"), ("experts kept", _kept(quality.metrics)),
        ("overlays", ", ".join(quality.metrics.get("student", {}).get("overlays", [])) or "none"),
        ("texts", f"`{quality.texts_sha256}`"),
        ("code", f"{quality.code.get('version')}, exporter `{quality.code.get('exporter_sha256')}`"),
    ])  # fmt: skip


def _kept(metrics: Metrics) -> str:
    kept = metrics.get("student", {}).get("experts_kept", [])
    runs: list[list[int]] = []
    for count in kept:
        if runs and runs[-1][0] == count:
            runs[-1][1] += 1
        else:
            runs.append([count, 1])
    return ", ".join(f"{count} in {layers} layer{'s' if layers > 1 else ''}" for count, layers in runs)


def _picture(plots: Sequence[str], name: str) -> Sequence[str]:
    return (f"![{name.replace('_', ' ')}]({name}.svg)", "") if name in plots else ()


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in ([*head], ["---"] * len(head), *cells)]


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


def _share(value: float) -> str:
    return f"{100 * value:.2f} %"


def _signed(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:+.2f} %"


def _signed_number(value: float) -> str:
    return f"{value:+.4g}"


def _kl_plot(metrics: Metrics) -> str:
    domains = metrics["domains"]
    values = [d["kl_mean"] for d in domains.values()]
    return svg.bars("Mean KL(teacher ‖ student)", list(domains), {"KL": values}, y_label="nats")


def _perplexity_plot(metrics: Metrics) -> str:
    rated = {name: d for name, d in metrics["domains"].items() if d["ppl_increase"] is not None}
    series = {who: [d[f"{who}_ppl"] for d in rated.values()] for who in ("teacher", "student")}
    return svg.bars("Perplexity", list(rated), series, y_label="perplexity") if rated else ""


def _layer_plot(metrics: Metrics) -> str:
    errors = metrics["layer_error"]
    title = "Relative error of the streams after each layer"
    return svg.lines(title, range(len(errors)), {"error": errors}, x_label="layer", y_label="relative error")


def _length_plot(metrics: Metrics) -> str:
    rows = metrics["lengths"]
    if len(rows) < 2:
        return ""
    series = {who: [row[f"{who}_ppl"] for row in rows] for who in ("teacher", "student")}
    return svg.lines(
        "Perplexity of the first n tokens of the same texts", [row["tokens"] for row in rows], series,
        x_label="tokens", y_label="perplexity", log_x=True, from_zero=False,
    )  # fmt: skip


def _needle_plot(metrics: Metrics) -> str:
    lengths = sorted({row["tokens"] for row in metrics["needles"]})
    if not lengths:
        return ""
    groups = [[row for row in metrics["needles"] if row["tokens"] == length] for length in lengths]
    series = {
        who: [sum(row[f"{who}_found"] for row in group) / sum(row["needles"] for row in group) for group in groups]
        for who in ("teacher", "student")
    }
    return svg.bars("Needles found", [f"{length:,} tokens" for length in lengths], series, y_label="share")


_PLOTS: Mapping[str, Callable[[Metrics], str]] = {
    "kl_by_domain": _kl_plot, "perplexity": _perplexity_plot, "layers": _layer_plot, "lengths": _length_plot,
    "needles": _needle_plot,
}  # fmt: skip
