"""The tables and the figure of docs/growth.md, from the records of benchmarks/growth.py."""

import statistics
from collections.abc import Sequence
from typing import Any

Records = dict[str, list[dict[str, Any]]]
MIB, GIB = 2**20, 2**30
# Okabe and Ito's colours, for colour-blind readers; markers and labels distinguish lines in black and white.
BLACK, ORANGE, GREEN, BLUE, VERMILLION = "#000000", "#E69F00", "#009E73", "#0072B2", "#D55E00"


def host_ratios(lines: Sequence[dict[str, Any]], of: str) -> dict[tuple[bool, int], tuple[float, float, float]]:
    """The ratio of a step's field `of` to that of one process in the same turn: median, minimum and maximum, by
    (whether each process has its own 8 rows, processes).
    """
    values = {(line["turn"], line["processes"], line["batch"]): line[of] for line in lines}
    counts = sorted({line["processes"] for line in lines})
    whole = [turn for turn in sorted({line["turn"] for line in lines})
             if all((turn, count, batch) in values for count in counts for batch in (8, 8 * count))]
    found = {}
    for own in (False, True):
        for count in counts:
            ratios = [values[turn, count, 8 * count if own else 8] / values[turn, 1, 8] for turn in whole]
            found[own, count] = statistics.median(ratios), min(ratios), max(ratios)
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(cells)} |" for cells in (head, *rows)]
    return "\n".join([lines[0], "|---" * len(head) + "|", *lines[1:]])


def tables(records: Records) -> str:
    """The tables as Markdown."""
    depth = {(line["layers"], line["unrolled"]): line for line in records["depth"]}
    of_depth = [[str(layers), *(f"{depth[layers, way][what]:.1f}" if (layers, way) in depth else ""
                                for way in (False, True) for what in ("tracing", "compiling"))]
                for layers, way in depth if not way]
    names = list(records["corpus"][0]["seconds"])
    of_corpus = [[f"10^{len(str(line['tokens'])) - 1}, {line['sources']}",
                  *(f"{1000 * line['seconds'][name]:.1f}" for name in names)] for line in records["corpus"]]
    of_vocabulary = [[f"{line['batch']} x {line['length']}", f"{line['vocabulary']:,}",
                      *(f"{size / MIB:,.0f}" for size in (
                          line["parameters"], line["temporaries"], line["temporaries"] - line["parameters"],
                          line["logits"]))] for line in records["vocabulary"]]
    processor, passed = (host_ratios(records["hosts"], of) for of in ("processor_seconds", "step_seconds"))
    of_hosts = [[str(count), *("{:.2f} ({:.2f}-{:.2f})".format(*ratios[own, count]) for ratios in (processor, passed)
                               for own in (False, True))] for count in sorted({count for _, count in passed})]
    by_devices = {(line["turn"], line["devices"]): line["processor_seconds"] for line in records["devices"]}
    of_devices = []
    for count in sorted({count for _, count in by_devices}):
        ratios = [seconds / by_devices[turn, 1] for (turn, other), seconds in by_devices.items()
                  if other == count and (turn, 1) in by_devices]
        of_devices.append([str(count), f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"])
    return "\n\n".join([
        table(["layers", "trace, s", "compile, s", "unrolled: trace", "compile"], of_depth),
        table(["tokens, sources", *(f"{name}, ms" for name in names)], of_corpus),
        table(["rows x length", "vocabulary", "parameters, MiB", "temporaries", "less a gradient", "all logits"],
              of_vocabulary),
        table(["processes", "processor time: 8 rows shared", "8 rows each", "time passed: 8 shared", "8 each"],
              of_hosts),
        table(["devices", "processor time of scoring"], of_devices)])


def draw(records: Records, path: str) -> None:
    """Draws all four parts in one figure; the suffix of the file (.svg, .png, .pdf) selects its format."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update({
        "font.size": 10, "axes.spines.top": False, "axes.spines.right": False,
        "svg.hashsalt": "growth", "lines.linewidth": 1.8, "lines.markersize": 6, "axes.titlesize": 11,
        "axes.titlelocation": "left", "axes.titleweight": "bold"})
    figure, ((depth, corpus), (vocabulary, hosts)) = pyplot.subplots(2, 2, figsize=(11, 8.6), layout="constrained")
    _depth(depth, records["depth"])
    _corpus(corpus, records["corpus"])
    _vocabulary(vocabulary, records["vocabulary"])
    _hosts(hosts, records["hosts"])
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr]
    figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None, dpi=150)


def _line(axes: Any, points: Sequence[tuple[float, float]], label: str, colour: str, marker: str, style: str = "-",
          above: int = 0) -> None:
    """Draws a line with its name at the right end, `above` points higher."""
    x, y = zip(*points, strict=True)
    axes.plot(x, y, style, color=colour, marker=marker, markerfacecolor="white", markeredgewidth=1.6, clip_on=False)
    axes.annotate(label, (x[-1], y[-1]), xytext=(8, above), textcoords="offset points", color=colour, va="center",
                  annotation_clip=False)


def _depth(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    for unrolled, label, colour, marker, style in (
            (True, "unrolled", VERMILLION, "s", "--"), (False, "scanned", BLUE, "o", "-")):
        _line(axes, [(line["layers"], line["tracing"] + line["compiling"]) for line in lines
                     if line["unrolled"] == unrolled], label, colour, marker, style)
    axes.set(title="Compile time against depth", xlabel="layers", ylabel="trace and compile, processor seconds",
             xscale="log", ylim=(0, None))
    axes.set_xticks(layers := sorted({line["layers"] for line in lines}), [str(one) for one in layers], minor=False)
    axes.minorticks_off()


def _corpus(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    shown = {"the plan's page": ("plan's page", "o", "-", 2), "first batch": ("first batch", "^", ":", 0),
             "the check of a resume": ("resume's check", "s", "--", -2)}
    for sources, colour in ((100, VERMILLION), (2, BLUE)):
        for name, (label, marker, style, above) in shown.items():
            _line(axes, [(line["tokens"], 1000 * line["seconds"][name]) for line in lines
                         if line["sources"] == sources], f"{label}, {sources}", colour, marker, style, above)
    axes.set(title="Start-up against corpus size, 2 and 100 sources", xlabel="tokens of the corpus",
             ylabel="processor milliseconds", xscale="log", yscale="log", ylim=(0.5, 500))


def _vocabulary(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    shapes = list(dict.fromkeys((line["batch"], line["length"]) for line in lines))
    for (batch, length), colour, marker, above in zip(
            shapes, (BLUE, VERMILLION, GREEN), ("o", "s", "^"), (-8, 0, 8), strict=True):
        _line(axes, [(line["vocabulary"], (line["temporaries"] - line["parameters"]) / GIB) for line in lines
                     if (line["batch"], line["length"]) == (batch, length)],
              f"{batch} rows of {length:,}", colour, marker, above=above)
    sizes = sorted({line["vocabulary"] for line in lines})
    for tokens in sorted({batch * length for batch, length in shapes}):
        _line(axes, [(size, 4 * tokens * size / GIB) for size in sizes], f"all logits of {tokens:,} tokens", BLACK,
              "", ":", 8 if tokens < 4096 else 0)
    axes.set(title="Memory against vocabulary", xlabel="pieces of the vocabulary, thousands",
             ylabel="temporaries less a gradient, GiB", ylim=(0, None))
    axes.set_xticks(sizes, [f"{size / 1000:.0f}" for size in sizes])


def _hosts(axes: Any, lines: Sequence[dict[str, Any]]) -> None:
    ratios = host_ratios(lines, "processor_seconds")
    counts = sorted({count for _, count in ratios})
    for own, label, colour, marker in ((True, "8 rows each", VERMILLION, "s"), (False, "8 rows shared", BLUE, "o")):
        _line(axes, [(count, ratios[own, count][0]) for count in counts], label, colour, marker)
        for count in counts:  # the spread over turns
            axes.plot([count, count], ratios[own, count][1:], color=colour, linewidth=1)
    _line(axes, [(count, count) for count in counts], "the work, 8 rows each", BLACK, "", ":")
    _line(axes, [(count, 1) for count in counts], "the work, 8 rows", BLACK, "", ":")
    axes.set(title="A step against processes", xlabel="processes, all on two cores",
             ylabel="processor time of a step, of one process's", xscale="log", ylim=(0, None))
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
