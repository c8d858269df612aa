"""The report's plots: small, side by side on a wide screen and one below the other on a phone.

Each function takes records and returns plots. What was not measured gives no plot. The plots of one function share
their axis limits, so that they can be compared by eye. Colours, SVG and PNG are left to `reports.theme`.
"""

from collections.abc import Iterable, Sequence
from statistics import NormalDist

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from reports.axes import (
    LABEL,
    LEGEND,
    NOTE,
    bounds,
    canvas,
    error_curve,
    in_percent,
    inner_legend,
    line_style,
    mark_style,
    mode_colour,
    mode_legend,
    name_ends,
    short,
    slug,
    style_axes,
)
from reports.drawing import Plot, drawing
from reports.text import (
    NOT_ESTIMABLE,
    cell_name,
    in_words,
    metric_name,
    percent,
    percent_of,
    points,
    pose_pair,
    verdict,
)
from reports.theme import RAMP_STEPS, light, mode_role
from schemas.metrics import RAW, MetricId
from schemas.reports import FEWEST_FALSE_MATCHES, CellResult, ChannelWeights, ModeResult, TrendPoint

Modes = dict[str, ModeResult]


# Fixed, so that a colour means the same in every run: a cell's step is the number of bounds its FNMR has reached.
_HEAT_BOUNDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)


_POSE_ORDER = ("frontal", "half", "profile", "unknown")


_TREND_LENGTH = 30


@drawing()
def differences(modes: Modes, cells: Sequence[str], metrics: Sequence[MetricId]) -> list[Plot]:
    """Draw mode − raw with its paired interval, one plot per metric, one row per cell; filled where significant."""
    shown = [mode for mode in modes.values() if mode.mode != RAW]
    found = [
        estimate
        for mode in shown
        for cell in cells
        for metric in metrics
        if (estimate := mode.difference_to_raw(cell, metric)) and estimate.value is not None
    ]
    if not found:
        return []
    reach = 115 * max(abs(bound) for estimate in found for bound in bounds(estimate)) or 1
    plots = []
    for metric in metrics:
        figure, axes = canvas(f"{metric_name(metric)}, minus raw", 360, 236, left=94, bottom=60)
        axes.axvline(0, color=light("ink"), lw=1)
        said = []
        for place, mode in enumerate(shown):
            shift = (place - (len(shown) - 1) / 2) * min(0.28, 0.8 / len(shown))
            for row, cell in enumerate(cells):
                estimate = mode.difference_to_raw(cell, metric)
                if estimate is None or estimate.value is None:
                    continue
                low, high = bounds(estimate)
                axes.plot([100 * low, 100 * high], [row + shift] * 2, color=mode_colour(mode.mode, modes), lw=2)
                significant = verdict(estimate) in ("better", "worse")
                axes.plot([100 * estimate.value], [row + shift], **mark_style(mode.mode, modes, solid=significant))
                said.append(f"{mode.mode} {cell_name(cell)} {points(estimate.value)} points, {verdict(estimate)}")
        axes.set_yticks(range(len(cells)), [short(cell_name(cell)) for cell in cells])
        axes.set(xlim=(-reach, reach), ylim=(len(cells) - 0.5, -0.5))
        axes.set_xlabel("percentage points")
        name_ends(axes, "\N{LEFTWARDS ARROW} better", "worse \N{RIGHTWARDS ARROW}")
        axes.grid(visible=False, axis="y")
        mode_legend(figure, [mode.mode for mode in shown], modes)
        name = f"difference-{slug(metric.replace('@', '-'))}"
        plots.append(Plot(name, f"{metric_name(metric)}: " + "; ".join(said), figure))
    return plots


@drawing()
def det_curves(modes: Modes, cells: Sequence[str]) -> list[Plot]:
    """Draw FNMR over FMR on normal-deviate axes, one plot per cell, with the intervals at FMR 1% and 0.1%.

    Curves end where fewer than 30 impostor pairs match.
    """
    drawn = [cell for cell in cells if any(_has_det(mode, cell) for mode in modes.values())]
    points = [point for cell in drawn for mode in modes.values() for point in _reliable(mode.cells.get(cell))]
    rates, misses = [fmr for fmr, _ in points if fmr > 0], [fnmr for _, fnmr in points if fnmr > 0]
    x_range = (max(1e-6, min([*rates, 0.1])), 0.5)
    y_range = (max(1e-5, min([*misses, 0.1])), min(0.95, max(0.5, *misses, 0.5)))
    plots = []
    for cell in drawn:
        figure, axes = canvas(cell_name(cell), 300, 264, left=46, bottom=38)
        said = []
        for mode in modes.values():
            result = mode.cells.get(cell)
            if result is None or result.det is None:
                continue
            kept = [
                (fmr, fnmr)
                for fmr, fnmr in _reliable(result)
                if x_range[0] <= fmr <= x_range[1] and y_range[0] <= fnmr <= y_range[1]
            ]
            x, y = [fmr for fmr, _ in kept], [fnmr for _, fnmr in kept]
            axes.plot(_deviates(x, x_range), _deviates(y, y_range), **line_style(mode.mode, modes))
            _det_intervals(axes, result, mode.mode, modes, x_range, y_range)
            said.append(f"{mode.mode} EER {in_words(result.eer)}")
        for axis, (low, high) in ((axes.xaxis, x_range), (axes.yaxis, y_range)):
            ticks = [tick for tick in (1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.05, 0.2, 0.5, 0.8, 0.95) if low <= tick <= high]
            axis.set_ticks(_deviates(ticks, (low, high)), [f"{100 * tick:.4g}" for tick in ticks])
        axes.set(xlim=_deviates(x_range, x_range), ylim=_deviates(y_range, y_range))
        axes.set(xlabel="false match rate, %", ylabel="false non-match rate, %")
        inner_legend(axes, modes)
        plots.append(Plot(f"det-{slug(cell)}", f"DET curves, {cell_name(cell)}: " + "; ".join(said), figure))
    return plots


@drawing()
def score_histograms(modes: Modes, cells: Sequence[str], fmr: str) -> list[Plot]:
    """Draw genuine and impostor scores, one plot per cell and one row per mode, with the global threshold at `fmr`."""
    drawn = [cell for cell in cells if any(_has_histogram(mode, cell) for mode in modes.values())]
    shown = [mode for mode in modes.values() if any(_has_histogram(mode, cell) for cell in drawn)]
    plots = []
    low, high = _score_range(shown, drawn)
    for cell in drawn:
        figure, base = canvas(cell_name(cell), 300, 64 + 62 * len(shown), left=8, bottom=38)
        base.set_axis_off()
        figure.legend(
            handles=[
                Line2D([], [], color=light("muted"), lw=1.2, label="impostor"),
                Patch(facecolor=light("rule"), label="genuine"),
            ],
            **LEGEND, loc="upper right", bbox_to_anchor=(1, 1.015),
        )  # fmt: skip
        box = base.get_position()
        said = []
        for row, mode in enumerate(shown):
            height = box.height / len(shown)
            axes = figure.add_axes((box.x0, box.y1 - (row + 1) * height, box.width, 0.92 * height))
            style_axes(axes)
            axes.spines["left"].set_visible(False)
            axes.set(xlim=(low, high), yticks=[])
            axes.tick_params(labelbottom=row == len(shown) - 1)
            tone = mode_colour(mode.mode, modes)
            axes.text(0.0, 0.96, short(mode.mode), transform=axes.transAxes, color=tone, **LABEL)
            result = mode.cells.get(cell)
            if result is None or result.histogram is None:
                continue
            _score_row(axes, result, tone, mode.thresholds.get(fmr))
            if row == len(shown) - 1:
                axes.set_xlabel("cosine score")
            miss = result.fnmr_global.get(fmr)
            said.append(f"{mode.mode} {in_words(miss)} of genuine pairs below the threshold" if miss else mode.mode)
        plots.append(Plot(f"scores-{slug(cell)}", f"Scores, {cell_name(cell)}: " + "; ".join(said), figure))
    return plots


@drawing()
def pose_heat_maps(modes: Modes, fmr: str) -> list[Plot]:
    """Draw FNMR by pose pair at the one global threshold found at `fmr`, one plot per mode."""
    found = {pose for mode in modes.values() for cell in mode.cells for pose in pose_pair(cell) or ()}
    poses = [pose for pose in _POSE_ORDER if pose in found] + sorted(found.difference(_POSE_ORDER))
    plots = []
    for mode in (one for one in modes.values() if any(map(pose_pair, one.cells))):
        figure, axes = canvas(mode.mode, 360, 268, left=62, bottom=62, colour=mode_colour(mode.mode, modes))
        said = []
        for row, first in enumerate(poses):
            for column, second in enumerate(poses[: row + 1]):
                result = mode.cells.get(f"{first}-{second}", mode.cells.get(f"{second}-{first}"))
                miss = result.fnmr_global.get(fmr) if result else None
                if result is None or miss is None:
                    continue
                _heat_cell(axes, column, row, miss.value, result.n_genuine)
                said.append(f"{second}\N{EN DASH}{first} {in_words(miss)}")
        axes.set(xlim=(-0.5, len(poses) - 0.5), ylim=(len(poses) - 0.5, -0.5))
        axes.set_xticks(range(len(poses)), [short(pose, 10) for pose in poses])
        axes.set_yticks(range(len(poses)), [short(pose, 10) for pose in poses])
        axes.tick_params(length=0)
        axes.grid(visible=False)
        for spine in axes.spines.values():
            spine.set_visible(False)
        _heat_key(figure)
        alt = f"{mode.mode}, FNMR at the global threshold of FMR {percent_of(fmr)}: " + "; ".join(said)
        plots.append(Plot(f"poses-{slug(mode.mode)}", alt, figure))
    return plots


@drawing()
def identification_curves(modes: Modes) -> list[Plot]:
    """Draw the share of probes found within rank k (CMC), and FNIR over FPIR, one plot each."""
    shown = {name: mode.identification for name, mode in modes.items() if mode.identification}
    plots = []
    for name, title, x_label, y_label in (
        ("cmc", "Rank-k identification rate (CMC)", "rank k", "mated probes identified, %"),
        ("fnir", "Open-set identification", "FPIR", "FNIR, %"),
    ):
        series = {mode: result.rank if name == "cmc" else result.fnir for mode, result in shown.items()}
        keys = sorted({key for curve in series.values() for key in curve}, key=float)
        if not keys:
            continue
        figure, axes = canvas(title, 360, 250, left=52, bottom=38)
        said = []
        for place, (mode, curve) in enumerate(series.items()):
            shift = (place - (len(series) - 1) / 2) * 0.1
            known = [
                (keys.index(key) + shift, curve[key]) for key in keys if key in curve and curve[key].value is not None
            ]
            error_curve(axes, known, mode, modes)
            said += [f"{mode} at {key} {in_words(curve[key])}" for key in keys if key in curve]
        for place, key in enumerate(keys):
            if all(key not in curve or curve[key].value is None for curve in series.values()):
                axes.annotate(NOT_ESTIMABLE, (place, 0), (0, 4), xycoords=("data", "axes fraction"),
                              textcoords="offset points", ha="center", **NOTE)  # fmt: skip
        labels = keys if name == "cmc" else [percent_of(key) for key in keys]
        axes.set_xticks(range(len(keys)), labels)
        axes.set(xlim=(-0.4, len(keys) - 0.6), xlabel=x_label, ylabel=y_label)
        inner_legend(axes, {mode: modes[mode] for mode in shown}, "lower right" if name == "cmc" else "best")
        plots.append(Plot(name, f"{title}: " + "; ".join(said), figure))
    return plots


@drawing()
def channel_weights(weights: Sequence[ChannelWeights]) -> list[Plot]:
    """Draw the channels' weights and their spread, falling, one plot per branch of a mode, the top channels named."""
    names = sorted({one.mode for one in weights})
    plots = []
    for one in weights:
        role = light(mode_role(one.mode, names))
        title = f"{short(one.mode)} \N{MIDDLE DOT} {short(one.branch)}"
        figure, axes = canvas(title, 300, 208, left=42, bottom=38, colour=role)
        falling = np.argsort(-np.array(one.mean), kind="stable")
        mean, spread = np.array(one.mean)[falling], np.array(one.spread)[falling]
        ranks = np.arange(1, len(mean) + 1)
        axes.fill_between(ranks, mean - spread, mean + spread, color=role, alpha=0.25, lw=0)
        axes.plot(ranks, mean, color=role, lw=1.7)
        note = "top: " + ", ".join(str(channel) for channel, _ in one.top[:5])
        if one.agreement is not None:
            note += f"\nrank correlation of members: {one.agreement:.2f}"
        axes.text(0.97, 0.93, note, ha="right", va="top", transform=axes.transAxes, **NOTE)
        axes.set(xlim=(0, len(mean) + 1), ylim=_weight_range(weights), xlabel="channels, by rank", ylabel="weight")
        best = ", ".join(f"{channel} ({weight:.3f})" for channel, weight in one.top[:5])
        alt = f"Channel weights of {one.mode}, {one.branch} branch; largest mean weights: {best}"
        plots.append(Plot(f"weights-{slug(one.mode)}-{slug(one.branch)}", alt, figure))
    return plots


@drawing()
def channel_relatedness(weights: Sequence[ChannelWeights], related: Sequence[float]) -> list[Plot]:
    """Draw every channel's learnt weight over its measured identity-relatedness, one plot per branch of a mode."""
    names = sorted({one.mode for one in weights})
    known = np.isfinite(related)
    ratios = np.array(related)[known]
    plots = []
    for one in weights if known.any() else ():
        role = light(mode_role(one.mode, names))
        title = f"{short(one.mode)} \N{MIDDLE DOT} {short(one.branch)}"
        figure, axes = canvas(title, 300, 208, left=42, bottom=38, colour=role)
        axes.scatter(ratios, np.array(one.mean)[known], s=5, color=role, alpha=0.5, lw=0)
        axes.set(ylim=_weight_range(weights), xlabel="identity-relatedness", ylabel="weight")
        alt = f"Mean weight of {len(ratios)} channels of {one.mode}, {one.branch} branch, over identity-relatedness"
        plots.append(Plot(f"relatedness-{slug(one.mode)}-{slug(one.branch)}", alt, figure))
    return plots


@drawing()
def trend_lines(trend: Sequence[TrendPoint]) -> list[Plot]:
    """Draw the gated metric over the last releases, one plot per mode; hollow marks were rejected."""
    recent = trend[-_TREND_LENGTH:]
    names = list(dict.fromkeys(mode for point in recent for mode in point.values))
    known_values = [one for point in recent for one in point.values.values() if one.value is not None]
    lowest = 100 * min((bounds(one)[0] for one in known_values), default=0)
    highest = 100 * max((bounds(one)[1] for one in known_values), default=0)
    margin = 0.08 * (highest - lowest) + 0.1
    plots = []
    for mode in names if known_values else ():
        figure, axes = canvas(mode, 360, 216, left=46, bottom=38, colour=mode_colour(mode, names))
        known = [
            (place, point.values[mode])
            for place, point in enumerate(recent)
            if mode in point.values and point.values[mode].value is not None
        ]
        error_curve(axes, known, mode, names, marks=False)
        for place, one in known:
            axes.plot([place], [in_percent(one)], **mark_style(mode, names, solid=recent[place].promoted))
        if known:
            place, one = known[-1]
            axes.annotate(percent(one.value or 0), (place, bounds(one)[1] * 100), (0, 4), textcoords="offset points",
                          ha="right" if len(recent) > 1 else "center", **NOTE)  # fmt: skip
        ticks = sorted({round(at) for at in np.linspace(0, len(recent) - 1, min(4, len(recent)))})
        axes.set_xticks(ticks, [f"{recent[tick].created:%d %b}" for tick in ticks])
        axes.set(xlim=(-0.5, max(0.5, len(recent) - 0.5)), ylabel="%")
        axes.set_ylim(max(0, lowest - margin), highest + 2 * margin)
        said = f"latest {in_words(known[-1][1])}" if known else "latest not estimable"
        alt = f"Gated metric of {mode} over {len(known)} releases: {said}"
        plots.append(Plot(f"trend-{slug(mode)}", alt, figure))
    return plots


def _deviates(rates: Sequence[float], span: tuple[float, float]) -> list[float]:
    """Return the standard normal quantiles of rates, clipped to `span`, since that of 0 is minus infinity."""
    return [NormalDist().inv_cdf(min(max(rate, span[0]), span[1])) for rate in rates]


def _reliable(result: CellResult | None) -> list[tuple[float, float]]:
    """Return the points (FMR, FNMR) of a DET curve that rest on enough false matches."""
    if result is None or result.det is None:
        return []
    least = FEWEST_FALSE_MATCHES / max(result.n_impostor, 1)
    return [point for point in zip(result.det.fmr, result.det.fnmr, strict=True) if point[0] >= least]


def _has_det(mode: ModeResult, cell: str) -> bool:
    return cell in mode.cells and mode.cells[cell].det is not None


def _det_intervals(
    axes: Axes,
    result: CellResult,
    mode: str,
    modes: Iterable[str],
    x_range: tuple[float, float],
    y_range: tuple[float, float],
) -> None:
    for fmr in ("1e-2", "1e-3"):
        miss = result.estimate(MetricId.at("fnmr", fmr))
        few = float(fmr) * result.n_impostor < FEWEST_FALSE_MATCHES
        if miss is None or miss.value is None or few or float(fmr) < x_range[0]:
            continue
        at = _deviates([float(fmr)], x_range)
        axes.plot(at * 2, _deviates(bounds(miss), y_range), color=mode_colour(mode, modes), lw=1, alpha=0.55)
        axes.plot(at, _deviates([miss.value], y_range), **(mark_style(mode, modes) | {"ms": 4}))


def _has_histogram(mode: ModeResult, cell: str) -> bool:
    return cell in mode.cells and mode.cells[cell].histogram is not None


def _score_range(modes: Sequence[ModeResult], cells: Sequence[str]) -> tuple[float, float]:
    """Return the range of scores that holds all bars above a thousandth of the highest of their histogram."""
    edges: list[float] = []
    for histogram in (mode.cells[cell].histogram for mode in modes for cell in cells if cell in mode.cells):
        if histogram is None:
            continue
        for bars in (histogram.genuine, histogram.impostor):
            seen = [place for place, bar in enumerate(bars) if bar > 0.001 * max(bars)]
            if seen:
                edges += [histogram.edges[seen[0]], histogram.edges[seen[-1] + 1]]
    return (min(edges), max(edges)) if edges else (-1.0, 1.0)


def _score_row(axes: Axes, result: CellResult, colour: str, threshold: float | None) -> None:
    assert result.histogram is not None
    histogram = result.histogram
    axes.stairs(histogram.genuine, histogram.edges, fill=True, color=colour, alpha=0.55, lw=0)
    axes.stairs(histogram.impostor, histogram.edges, color=light("muted"), lw=1.2)
    axes.set_ylim(0, 1.3 * max([*histogram.genuine, *histogram.impostor, 1e-9]))
    if threshold is not None:
        axes.axvline(threshold, ymax=0.8, color=light("ink"), lw=1, ls=(0, (2, 2)))


def _heat_cell(axes: Axes, column: int, row: int, value: float | None, n_genuine: int) -> None:
    step = 0 if value is None else sum(value >= bound for bound in _HEAT_BOUNDS)
    face = "none" if value is None else light(f"ramp-{step}")
    axes.add_patch(Rectangle((column - 0.48, row - 0.48), 0.96, 0.96, facecolor=face, edgecolor=light("grid"), lw=0.8))
    ink = light("muted") if value is None else light("on-pale" if step < RAMP_STEPS // 2 else "on-deep")
    text = NOT_ESTIMABLE if value is None else f"{percent(value)}%"
    axes.text(column, row - 0.1, text, ha="center", va="center", fontsize=11, fontweight="bold", color=ink)
    axes.text(column, row + 0.24, f"n {n_genuine:,}", ha="center", va="center", fontsize=8.5, color=ink)


def _heat_key(figure: Figure) -> None:
    """Draw the scale of the heat map along the foot of the figure."""
    width, height = figure.get_size_inches() * 72
    key = figure.add_axes((62 / width, 18 / height, 1 - 72 / width, 7 / height))
    style_axes(key)
    for step in range(RAMP_STEPS):
        key.add_patch(Rectangle((step, 0), 1, 1, facecolor=light(f"ramp-{step}"), edgecolor=light("grid"), lw=0.5))
    key.set(xlim=(0, RAMP_STEPS), ylim=(0, 1), yticks=[])
    key.set_xticks(range(1, RAMP_STEPS), [f"{100 * bound:g}%" for bound in _HEAT_BOUNDS])
    key.tick_params(length=0, pad=2, labelsize=8.5)
    for spine in key.spines.values():
        spine.set_visible(False)


def _weight_range(weights: Sequence[ChannelWeights]) -> tuple[float, float]:
    low = min(mean - spread for one in weights for mean, spread in zip(one.mean, one.spread, strict=True))
    high = max(mean + spread for one in weights for mean, spread in zip(one.mean, one.spread, strict=True))
    margin = 0.12 * (high - low) + 1e-3
    return low - margin / 2, high + margin
