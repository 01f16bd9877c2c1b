"""The page of `t5x report DIR --serve`: a study, a run or a folder of runs as HTML.

Run names, errors and all other data are escaped text. The only script is `SCRIPT`, which the server provides as a
separate file; the browser is told to run no other.
"""

import html
import time
from collections.abc import Iterable, Mapping, Sequence

from codellm_jax.report.pages import STYLE
from codellm_jax.runtime.progress import duration
from codellm_jax.study.status import ENDED, OfStudy
from codellm_jax.watching.chart import curves
from codellm_jax.watching.runs import OfRun
from codellm_jax.watching.show import POOLS, describe_state, ledger_lines, mean_of

CURVES = 10  # in a chart
END_OF_NOTICE = "<!-- end of notice -->"

SCRIPT = """"use strict";
const shown = {};
async function refresh() {
  const notice = document.getElementById("notice");
  try {
    for (const name of ["now", "told", "losses"]) {
      const answer = await fetch("/" + name, {cache: "no-store"});
      if (!answer.ok) throw new Error("status " + answer.status);
      const text = await answer.text();
      if (text !== shown[name]) document.getElementById(name).innerHTML = shown[name] = text;
    }
    notice.textContent = "";
  } catch (error) {
    notice.textContent = "The server does not answer (" + error.message + "). The content may be out of date.";
  }
  setTimeout(refresh, 3000);
}
refresh();
"""
LIVE_STYLE = STYLE + """
#notice:empty { display: none; }
.bar { display: flex; height: 1.1rem; max-width: 46rem; border-radius: 4px; overflow: hidden; margin: .5rem 0; }
.bar svg { width: 100%; height: 100%; }
.done { fill: var(--done); } .training, .evaluating { fill: var(--work); } .failed, .skipped { fill: var(--bad); }
.left { fill: var(--rule); }
.legend span { margin-right: 1.25rem; white-space: nowrap; }
.legend svg { width: .8rem; height: .8rem; vertical-align: -1px; margin-right: .35rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(34rem, 100%), 1fr)); gap: 0 2rem; }
svg.chart { width: 100%; height: auto; font: 11px system-ui, sans-serif; }
svg.chart text { fill: var(--text); } svg.chart .grid { stroke: var(--rule); stroke-width: 1; }
svg.chart polyline, svg.chart line { fill: none; stroke-width: 2; }
svg.chart .c0 { stroke: var(--c0); } svg.chart .c1 { stroke: var(--c1); } svg.chart .c2 { stroke: var(--c2); }
svg.chart .c3 { stroke: var(--c3); } svg.chart .c4 { stroke: var(--c4); } svg.chart .c5 { stroke: var(--c5); }
svg.chart .c6 { stroke: var(--c6); }
@media (max-width: 40rem) { .charts figure { overflow-x: auto; } svg.chart { min-width: 30rem; } }
figure figcaption { margin-bottom: .25rem; }
pre { overflow-x: auto; font: .82rem ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
footer { color: var(--quiet); font-size: .85rem; margin-top: 3rem; }
"""


def page(name: str) -> str:
    """The page around the parts that refresh; `name` is that of the directory."""
    title = html.escape(name)
    return (f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{title}</title>\n'
            f'<link rel="stylesheet" href="/page.css">\n<script src="/page.js" defer></script>\n</head>\n<body>\n'
            f'<h1>{title}</h1>\n<p id="notice" class="notice" role="status"></p>\n<main id="now"></main>\n'
            f'<section id="told"></section>\n<section id="losses"></section>\n'
            f'<noscript><p>This page needs JavaScript to refresh itself. <a href="/now">Current state</a></p>'
            f'</noscript>\n</body>\n</html>\n')


def notice(text: str) -> str:
    """An important message, shown before everything else in the part "now"."""
    return f'<p class="notice">{html.escape(text)}</p>{END_OF_NOTICE}'


def study_now(study: OfStudy, runs: Sequence[OfRun], report_at: float | None) -> dict[str, str]:
    """The current state of a study: the parts "now" and "losses" of the page, with the effects and laws between them.

    Args:
      study: its progress.
      runs: the runs whose directories exist.
      report_at: when its report was written, in seconds of the wall clock; None if there is none.
    """
    by_name = {run.name: run for run in runs}
    states = [of_run.state for of_run in study.runs.values()]
    counts = {"done": states.count("done"), "training": sum(state in ("training", "evaluating") for state in states),
              "failed": sum(state in ("failed", "skipped") for state in states)}
    counts["left"] = len(states) - sum(counts.values())
    left = f", about {duration(study.seconds_left)} left" if study.seconds_left else ""
    workers = f"{study.workers or 'no'} worker{'s' * (study.workers != 1)} at work" if any(
        state not in ENDED for state in states) else "all runs have ended"
    parts = [f"<p>{counts['done']} of {len(states)} runs are done; {workers}{left}.</p>", _bar(counts)]
    if report_at is not None:
        parts.append(f'<p><a href="/report/report.html">The report</a> of '
                     f'{time.strftime("%Y-%m-%d %H:%M", time.localtime(report_at))}</p>')
    parts += [f"<p>{html.escape(line)}.</p>" for line in study.others]
    of_arms = {arm: found for arm, names in study.arms.items()
               if (found := [by_name[name] for name in names if name in by_name])}
    return {"now": "\n".join([*parts, *_at_work(study, by_name), *_failed(study)]),
            "losses": "\n".join([*_charts(of_arms), *_plan(study, by_name), _footer(study.read_at)])}


def runs_now(runs: Sequence[OfRun], now: float) -> dict[str, str]:
    """The current state of a folder of runs."""
    rows = []
    for run in runs:
        train, held_out = run.last("train"), run.last("eval")
        rows.append([run.name, describe_state(run, now), *map(_loss, [
            train.get("loss"), *(held_out.get(f"loss/{pool}") for pool in POOLS)]), _rate(run)])
    text = "A row for each run: its progress, its last losses in nats per token, and its speed."
    table = _table(text, ("Run", "State", "Training loss", "Held-out text", "Held-out code", "Tokens/s"), rows,
                   words=(1,))
    return {"now": table, "losses": "\n".join([*_charts({run.name: [run] for run in runs}), _footer(now)])}


def run_now(run: OfRun, now: float) -> dict[str, str]:
    """The current state of one run."""
    ledger = "\n".join(ledger_lines(run.provenance.get("ledger") or {}))
    held_out = run.last("eval")
    rows = [["Training", f"{run.last('train').get('step', 0):,}", _loss(run.last("train").get("loss"))],
            *([f"Held-out {pool}", f"{held_out.get('step', 0):,}", _loss(held_out.get(f"loss/{pool}"))]
              for pool in POOLS)]
    state = f"<p>{html.escape(describe_state(run, now))}; {_rate(run)} tokens/s.</p>"
    table = _table("The last losses of the run, in nats per token.", ("Loss", "Step", "Value"), rows)
    trained_on = [f"<p>Training data, as of its last start or end:</p><pre>{html.escape(ledger)}</pre>"]
    return {"now": f"{state}\n{table}", "losses": "\n".join([
        *_charts({run.name: [run]}), *trained_on * bool(ledger), _footer(now)])}


def _bar(counts: Mapping[str, int]) -> str:
    """The numbers of runs that are done, active, failed and left, as a bar with a legend."""
    words = {"done": "done", "training": "running", "failed": "failed", "left": "left"}
    total, at, parts = sum(counts.values()) or 1, 0.0, []
    for name, count in counts.items():
        wide = 100 * count / total
        parts.append(f'<rect class="{name}" x="{at:.3f}" width="{wide:.3f}" height="10"/>')
        at += wide
    legend = "".join(f'<span><svg viewBox="0 0 10 10" aria-hidden="true"><rect class="{name}" width="10" height="10"/>'
                     f'</svg>{count} {words[name]}</span>' for name, count in counts.items())
    return (f'<div class="bar"><svg viewBox="0 0 100 10" preserveAspectRatio="none" aria-hidden="true">'
            f'{"".join(parts)}</svg></div><p class="legend">{legend}</p>')


def _at_work(study: OfStudy, runs: Mapping[str, OfRun]) -> list[str]:
    rows = []
    for name, of_run in study.runs.items():
        if of_run.holder is None and of_run.state not in ("begun", "trained"):
            continue
        run = runs.get(name)
        rows.append([
            name, of_run.state, f"{of_run.step:,} of {of_run.steps:,}",
            _loss(run.last("train").get("loss") if run else None), _rate(run),
            "-" if of_run.left is None else duration(of_run.left),
            f"{of_run.holder.worker}, since {duration(study.read_at - of_run.holder.since)}" if of_run.holder else "-"])
    return ["<h2>Running</h2>", _table(
        "The runs that a worker trains or evaluates, and started runs that wait for a worker.",
        ("Run", "State", "Step", "Training loss", "Tokens/s", "Left", "Worker"), rows, words=(1, 6))] if rows else []


def _failed(study: OfStudy) -> list[str]:
    rows = [[name, of_run.state, of_run.note] for name, of_run in study.runs.items()
            if of_run.state in ("failed", "skipped")]
    return ["<h2>Failed</h2>", _table(
        "The runs that failed, and those that start from one of them. The same t5x study command tries them again.",
        ("Run", "State", "Why"), rows, words=(1, 2))] if rows else []


def _plan(study: OfStudy, runs: Mapping[str, OfRun]) -> list[str]:
    rows = []
    for arm, names in study.arms.items():
        states = [study.runs[name].state for name in names]
        ended = [runs[name].last("eval") for name in names if study.runs[name].state == "done" and name in runs]
        planned = study.plan[names[0]]
        start = str(planned.get("from") or "-")
        told = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        rows.append([arm, str(planned.get("stage", "-")), start, f"{study.runs[names[0]].steps:,}", told,
                     *(mean_of(line.get(f"loss/{pool}") for line in ended) for pool in POOLS)])
    return ["<h2>The plan</h2>", _table(
        "A row for each arm: its stage, the start of its first seed, the progress of its seeds, and the mean of the "
        "last held-out losses of finished seeds, in nats per token.",
        ("Arm", "Stage", "Starts from", "Steps", "Seeds", "Held-out text", "Held-out code"), rows, words=(1, 2, 4))]


def _charts(arms: Mapping[str, Sequence[OfRun]]) -> list[str]:
    """Curves of the arms whose records changed last: held-out losses if there are any, else training losses."""
    newest = sorted(arms, key=lambda arm: -max(run.changed_at or 0.0 for run in arms[arm]))[:CURVES]
    shown = {arm: arms[arm] for arm in arms if arm in newest}
    titles = {"Training loss": ("train", "loss"), "Held-out text": ("eval", "loss/text"),
              "Held-out code": ("eval", "loss/code")}
    which = f", of the {len(shown)} arms of {len(arms)} that changed last" if len(shown) < len(arms) else ""
    found = [curves(f"{title}{which}, the mean over seeds up to the last step that all have reached", "nats per "
                                                                                                      "token", {
        arm: _mean([[(line["step"], line[name]) for line in run.records
                     if line["split"] == split and line.get(name) is not None] for run in of_arm])
        for arm, of_arm in shown.items()}) for title, (split, name) in titles.items()]
    return [f'<h2>Losses</h2><div class="charts">{"".join(found)}</div>'] if any(found) else []


def _mean(seeds: Sequence[Sequence[tuple[float, float]]]) -> list[tuple[float, float]]:
    """The mean of curves at the steps that all of them have."""
    begun = [dict(points) for points in seeds if points]
    steps = set.intersection(*map(set, begun)) if begun else set()
    return [(step, sum(points[step] for points in begun) / len(begun)) for step in sorted(steps)]


def _rate(run: OfRun | None) -> str:
    return f"{run.tokens_per_second:,.0f}" if run is not None and run.tokens_per_second else "-"


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _table(text: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[int] = ()) -> str:
    classes = [' class="text"' if number == 0 or number in words else "" for number in range(len(columns))]
    head = "".join(f"<th{kind}>{html.escape(name)}</th>" for name, kind in zip(columns, classes, strict=True))
    body = "".join("<tr>" + "".join(f"<td{kind}>{html.escape(cell)}</td>" for cell, kind in zip(
        row, classes, strict=True)) + "</tr>\n" for row in rows)
    return (f'<p class="caption">{html.escape(text)}</p><div class="wide"><table><thead><tr>{head}</tr></thead>'
            f"<tbody>{body}</tbody></table></div>")


def _footer(now: float) -> str:
    return f"<footer>Read at {time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(now))}.</footer>"
