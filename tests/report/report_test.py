"""`t5x report`: every number computed again from the questions' lines; what must not be mixed; the page itself."""

import collections
import csv
import html.parser
import importlib.util
import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from scipy import stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint

from codellm_jax import cli
from codellm_jax.report.pages import Heading, Items, Notice, Table, Text, markdown, page
from codellm_jax.report.write import read_study, report
from codellm_jax.results.statistics import sign_flips
from tasks.benchmarks.metrics import bleu_of_counts

_spec = importlib.util.spec_from_file_location("planted", Path(__file__).parent.parent / "planted.py")
assert _spec and _spec.loader
planted = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(planted)
write_study, write_task, TINY = planted.write_study, planted.write_task, planted.TINY

N = {"logic": 22, "jecqa": 120, "scienceqa": 150, "scienceqa_cot": 60, "ekar": 150, "ekar_cot": 60, "cosqa": 300,
     "mbpp": 150, "c3": 150, "ocnli": 150, "cmnli": 150, "dureader": 40}
OVERLAPPING = {"mbpp": {"mbpp-1", "mbpp-7"}, "cosqa": {"cosqa-0"}}


def write_contamination(folder: Path) -> None:
    (folder / "contamination.json").write_text(json.dumps({"n": 13, "tasks": {task: {
        "questions": n, "not_measurable": 1, "sources": {
            "text.books": {"overlapping": 0, "ids": []},
            "code.github": {"overlapping": len(OVERLAPPING.get(task, ())), "ids": sorted(OVERLAPPING.get(task, ()))}}}
        for task, n in N.items() if task != "cmnli"}}))


@pytest.fixture(scope="module")
def one_seed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one_seed")
    write_study(folder, ["NL", "CODE", "NN", "CN", "NC-decrease", "CC-decrease"], 1, N, {("CODE", "jecqa"): 1.0})
    write_contamination(folder)
    report(str(folder), say=lambda line: None)
    return folder


@pytest.fixture(scope="module")
def three_seeds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three_seeds")
    write_study(folder, ["NL", "CODE", "NN", "NC-decrease"], 3,
                {"logic": 22, "cosqa": 300, "mbpp": 100, "dureader": 40}, {("NC-decrease", "cosqa"): 1.0})
    report(str(folder), say=lambda line: None)
    return folder


def table(folder: Path, name: str) -> list[dict[str, str]]:
    with (folder / "report" / f"{name}.csv").open() as file:
        return list(csv.DictReader(file))


def lines_of(folder: Path, arm: str, task: str, without: set[str] = frozenset()) -> list[list[dict]]:
    """For each seed of an arm the lines of a task, read anew."""
    found = []
    for run in sorted((folder / "runs").glob(f"{arm}.seed*")):
        path = next(iter(run.glob(f"results/{task}.jsonl")), None)
        if path:
            lines = [json.loads(line) for line in path.read_text().splitlines()][1:]
            found.append([line for line in lines if line["id"] not in without])
    return found


def score(lines: list[dict], metric: str) -> float:
    """In per cent, by a plain loop."""
    if metric == "bleu":
        total = [0] * 10
        for line in lines:
            for place, count in enumerate(line["bleu_counts"]):
                total[place] += count
        return float(bleu_of_counts(np.array(total)))
    right = 0.0
    for line in lines:
        right += line["correct"] if metric == "accuracy" else line[metric]
    return 100 * right / len(lines)


def mean_over_seeds(seeds: list[list[dict]], metric: str) -> float:
    return sum(score(lines, metric) for lines in seeds) / len(seeds)



def test_every_score_comes_of_the_lines(one_seed, three_seeds):
    for folder, overlapping in ((one_seed, OVERLAPPING), (three_seeds, {})):
        rows = table(folder, "scores")
        assert len(rows) == len({(row["arm"], row["task"], row["metric"]) for row in rows}) > 10
        for row in rows:
            for prefix, without in (("", set()), ("clean_", overlapping.get(row["task"], set()))):
                seeds = lines_of(folder, row["arm"], row["task"], without)
                assert int(row[f"{prefix}n"]) == len(seeds[0])
                assert float(row[f"{prefix}value"]) == pytest.approx(mean_over_seeds(seeds, row["metric"]))
                if row["metric"] == "accuracy":
                    counts = collections.Counter(line["answer"] for line in seeds[0])
                    assert float(row[f"{prefix}majority"]) == pytest.approx(100 * max(counts.values()) / len(seeds[0]))
                    assert float(row[f"{prefix}chance"]) == pytest.approx(
                        100 * sum(1 / len(line["candidates"]) for line in seeds[0]) / len(seeds[0]))
                else:
                    assert row[f"{prefix}chance"] == row[f"{prefix}majority"] == ""
            measured = folder is one_seed and row["task"] != "cmnli"
            assert row["overlapping"] == (str(len(overlapping.get(row["task"], ()))) if measured else "")


def test_intervals_of_one_seed_are_those_of_statsmodels(one_seed):
    checked = 0
    for row in table(one_seed, "scores"):
        [lines] = lines_of(one_seed, row["arm"], row["task"])
        low, high = float(row["low"]), float(row["high"])
        if row["metric"] in ("accuracy", "pass@1", "exact_match"):
            right = round(score(lines, row["metric"]) * len(lines) / 100)
            expected = proportion_confint(right, len(lines), method="wilson")
            assert (low, high) == pytest.approx(tuple(100 * bound for bound in expected))
            checked += 1
        elif row["metric"] == "f1":
            drawn = stats.bootstrap(([line["f1"] for line in lines],), np.mean, method="percentile", rng=1)
            assert (low, high) == pytest.approx(tuple(100 * bound for bound in drawn.confidence_interval), abs=1.0)
        else:
            assert low < float(row["value"]) < high
    assert checked > 60


def crossed(values: list[np.ndarray], level: float) -> tuple[float, float]:
    """Half the interval and the p-value of a mean, by hand: [S, n] of one arm, or of two with equally many seeds."""
    means = [arm.mean(1) for arm in values]
    parts = [(sum(mean.var(ddof=1) for mean in means) / len(means[0]), len(means) * (len(means[0]) - 1))]
    questions = values[0].mean(0) - (values[1].mean(0) if len(values) > 1 else 0)
    parts.append((questions.var(ddof=1) / len(questions), len(questions) - 1))

    def half(level: float) -> float:
        return math.sqrt(sum(part * stats.t.ppf((1 + level) / 2, freedom) ** 2 for part, freedom in parts))

    levels = 1 - np.geomspace(1e-6, 1, 4001)  # the p-value by looking where the interval reaches 0
    return half(level), 1 - next((one for one in levels if half(one) <= abs(questions.mean())), 0.0)


def answers(folder: Path, arm: str, task: str, metric: str) -> np.ndarray:
    name = "correct" if metric == "accuracy" else metric
    return np.array([[float(line[name]) for line in lines] for lines in lines_of(folder, arm, task)])


def test_intervals_and_tests_of_several_seeds(three_seeds):
    """NN and NC of a seed started from the same run, and are paired; NL and CODE have nothing in common."""
    for row in table(three_seeds, "scores"):
        if row["metric"] != "bleu":
            values = answers(three_seeds, row["arm"], row["task"], row["metric"])
            half, _ = crossed([values], 0.95)
            assert float(row["low"]) == pytest.approx(max(0, 100 * (values.mean() - half)))
            assert float(row["high"]) == pytest.approx(min(100, 100 * (values.mean() + half)))
    rows = table(three_seeds, "differences")
    assert {(row["first"], row["second"]) for row in rows} == {("CODE", "NL"), ("NC-decrease", "NN")}
    for row in rows:
        assert row["test"] == "seeds"
        if row["metric"] == "bleu":
            continue
        both = [answers(three_seeds, row[which], row["task"], row["metric"]) for which in ("first", "second")]
        half, p_value = crossed([both[0] - both[1]] if row["first"] == "NC-decrease" else both, 0.95)
        difference = both[0].mean() - both[1].mean()
        assert [float(row[name]) for name in ("difference", "low", "high")] == pytest.approx(
            [100 * difference, 100 * (difference - half), 100 * (difference + half)])
        assert float(row["p"]) == pytest.approx(p_value, rel=0.01)
    corrected = multipletests([float(row["p"]) for row in rows], method="holm")[1]
    assert [float(row["p_holm"]) for row in rows] == pytest.approx(corrected.tolist())


def test_bleu_of_several_seeds_by_a_slow_jackknife(three_seeds):
    row = next(row for row in table(three_seeds, "scores") if row["metric"] == "bleu")
    pseudo = []
    for lines in lines_of(three_seeds, row["arm"], "mbpp"):
        n, whole = len(lines), score(lines, "bleu")
        pseudo.append([n * whole - (n - 1) * score(lines[:place] + lines[place + 1:], "bleu") for place in range(n)])
    half, _ = crossed([np.array(pseudo)], 0.95)
    assert float(row["low"]) == pytest.approx(float(row["value"]) - half)


def test_differences_of_one_seed_are_mcnemars(one_seed):
    rows = table(one_seed, "differences")
    assert [(row["first"], row["second"]) for row in rows if row["task"] == "logic"] == [
        ("CODE", "NL"), ("NC-decrease", "NN"), ("CC-decrease", "CN"), ("CN", "NN"), ("CC-decrease", "NC-decrease")]
    for row in rows:
        first, second = (lines_of(one_seed, row[which], row["task"])[0] for which in ("first", "second"))
        assert float(row["difference"]) == pytest.approx(score(first, row["metric"]) - score(second, row["metric"]))
        gone = OVERLAPPING.get(row["task"], set())
        if gone:
            kept = [[line for line in lines if line["id"] not in gone] for lines in (first, second)]
            assert float(row["clean_difference"]) == pytest.approx(
                score(kept[0], row["metric"]) - score(kept[1], row["metric"]))
        if row["metric"] in ("accuracy", "pass@1"):
            name = "correct" if row["metric"] == "accuracy" else row["metric"]
            counts = np.zeros((2, 2))
            for one, other in zip(first, second, strict=True):
                counts[int(one[name]), int(other[name])] += 1
            assert row["test"] == "McNemar" and float(row["p"]) == pytest.approx(mcnemar(counts, exact=True).pvalue)
    corrected = multipletests([float(row["p"]) for row in rows], method="holm")[1]
    assert [float(row["p_holm"]) for row in rows] == pytest.approx(corrected.tolist())


def test_the_papers_tables_stand_beside(one_seed):
    rows = table(one_seed, "table_3")
    cell = {(row["task"], row["metric"], row["column"]): row for row in rows}
    ours = next(row for row in table(one_seed, "scores") if (row["arm"], row["task"]) == ("NN", "logic"))
    found = cell["logic", "accuracy", "NN (2.6B)"]
    assert [found[name] for name in ("arm", "value", "low", "high", "n")] == [
        "NN", *(ours[name] for name in ("value", "low", "high", "n"))]
    assert (found["paper_n"], found["paper_value"]) == ("22", "36.36")
    assert [float(found["paper_low"]), float(found["paper_high"])] == pytest.approx(
        [100 * bound for bound in proportion_confint(8, 22, method="wilson")])
    assert cell["logic", "accuracy", "CN, not in the paper"]["arm"] == "CN"
    assert cell["logic", "accuracy", "NN (13B)"]["value"] == "" != cell["logic", "accuracy", "NN (13B)"]["paper_value"]
    bleu = cell["mbpp", "bleu", "CC (2.6B)"]
    assert bleu["paper_value"] == "24.88" and bleu["paper_low"] == "" and bleu["arm"] == "CC-decrease"
    assert cell["mbpp", "pass@1", "CC (2.6B)"]["paper_value"] == ""
    thought = {(row["row"], row["column"]): row for row in table(one_seed, "table_4")}
    found = thought["CODE (2.6B), E-KAR", "with"]
    lines = lines_of(one_seed, "CODE", "ekar_cot")[0]
    assert (found["arm"], found["task"], found["paper_value"]) == ("CODE", "ekar_cot", "72.84")
    assert float(found["value"]) == pytest.approx(score(lines, "accuracy")) and int(found["n"]) == len(lines) == 60
    assert ", n 60<br>paper 72.84" in (one_seed / "report" / "report.md").read_text()  # 150 without chain of thought
    for number_ in (2, 3, 4, 6, 7, 8):
        assert f"### Table {number_}:" in (one_seed / "report" / "report.md").read_text()


def test_the_page_shows_the_numbers_of_the_tables(one_seed):
    markdown = (one_seed / "report" / "report.md").read_text()
    page = (one_seed / "report" / "report.html").read_text()
    for row in table(one_seed, "scores"):
        shown = f"{float(row['value']):.2f} [{float(row['low']):.1f}, {float(row['high']):.1f}]"
        assert shown in markdown and shown in page
    for row in table(one_seed, "differences"):
        assert f"{float(row['difference']):+.2f}".replace("-", "\N{MINUS SIGN}") in page


def test_questions_that_overlap_are_marked(one_seed, three_seeds):
    marked = {(row["task"], row["id"]): row["overlapping_sources"] for row in table(one_seed, "questions")}
    assert {key for key, sources in marked.items() if sources} == {
        (task, id_) for task, ids in OVERLAPPING.items() for id_ in ids}
    assert marked["mbpp", "mbpp-7"] == "code.github"
    markdown = (one_seed / "report" / "report.md").read_text()
    assert "… without 2 overlapping | 148 |" in markdown and "- mbpp: `mbpp-1`, `mbpp-7`" in markdown
    assert "| cmnli | 150 | not measured |" in markdown
    assert "Contamination was not measured" in (three_seeds / "report" / "report.md").read_text()


def test_contamination_of_other_files_is_not_used(one_seed, tmp_path):
    shutil.copytree(one_seed, tmp_path / "study")
    measured = json.loads((one_seed / "contamination.json").read_text())
    measured["tasks"]["mbpp"]["data"] = "of other files"
    (tmp_path / "study" / "contamination.json").write_text(json.dumps(measured))
    study = read_study(epath.Path(tmp_path / "study"))
    assert not study.measured("mbpp") and study.measured("cosqa") and not study.overlapping("mbpp")
    (tmp_path / "study" / "contamination.json").write_text('{"n": 13, "tasks": {"mbpp": {}}}')
    with pytest.raises(ValueError, match="contamination.json does not say which questions overlap"):
        read_study(epath.Path(tmp_path / "study"))


def test_a_task_of_ties_has_no_score_anywhere(tmp_path, capsys):
    """Of NL most questions of Logic are ties, of both arms some of CosQA; every other number is as it was."""
    n = {"logic": 22, "jecqa": 40, "scienceqa": 40, "ekar": 40, "cosqa": 40}
    write_study(tmp_path, ["NL", "CODE"], 1, n, {("NL", "logic"): 9.0})
    for arm in ("NL", "CODE"):
        write_task(tmp_path / "runs" / f"{arm}.seed0", "cosqa", 40, 0.0, arm, ties=7)
    write_task(tmp_path / "runs" / "NL.seed0", "logic", 22, 9.0, "NL", ties=12)
    value = json.loads((tmp_path / "runs/NL.seed0/results/logic.json").read_text())["value"]
    report(str(tmp_path), say=lambda line: None)
    scores = {(row["arm"], row["task"]): row for row in table(tmp_path, "scores")}
    assert ("NL", "logic") not in scores and ("CODE", "logic") in scores
    differences = {row["task"]: row for row in table(tmp_path, "differences")}
    assert "logic" not in differences and differences["jecqa"]["test"] == "McNemar"
    credits = [[line["correct"] for line in lines_of(tmp_path, arm, "cosqa")[0]] for arm in ("CODE", "NL")]
    assert differences["cosqa"]["test"] == "sign flips"
    assert float(differences["cosqa"]["p"]) == pytest.approx(sign_flips(*credits))
    paper = {(row["task"], row["column"]): row for row in table(tmp_path, "table_2")}
    assert paper["logic", "NL (2.6B)"]["value"] == "" != paper["logic", "CODE (2.6B)"]["value"]
    results = {(row["run"], row["task"]): row for row in table(tmp_path, "results")}
    assert [results[f"{arm}.seed0", task]["ties"] for arm in ("NL", "CODE") for task in ("logic", "cosqa")] == [
        "12", "7", "0", "7"]
    assert {key for key, row in results.items() if row["measured"] == "False"} == {("NL.seed0", "logic")}
    conclusions = {row["contrast"]: row for row in table(tmp_path, "conclusions")}
    found = conclusions["reasoning: CODE - NL"]
    assert (found["contrast_verdict"], found["why"]) == ("open", "most questions of logic are ties")
    assert found["difference"] == ""
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert markdown.count("not measured: ties") == 2  # in the paper's table and among all scores
    assert "logic is not measured for `NL.seed0`: most questions are ties." in markdown
    assert "cosqa: questions where several candidates tie; k tied candidates count 1 / k: 7 in each run." in markdown
    assert f"{100 * value:.2f}" not in markdown
    # Ties that leave a measurement count in part.
    for arm in ("NL", "CODE"):
        [lines] = lines_of(tmp_path, arm, "cosqa")
        right = sum(line["correct"] for line in lines)
        assert right % 1 == 0.5 and float(scores[arm, "cosqa"]["value"]) == pytest.approx(100 * right / 40)
        expected = proportion_confint(right, 40, method="wilson")
        assert (float(scores[arm, "cosqa"]["low"]), float(scores[arm, "cosqa"]["high"])) == pytest.approx(
            tuple(100 * bound for bound in expected))
        result = json.loads((tmp_path / f"runs/{arm}.seed0/results/cosqa.json").read_text())
        assert result["value"] == pytest.approx(right / 40) and result["interval"] == pytest.approx(list(expected))


def test_a_study_of_nothing_but_ties_is_reported_as_that(tmp_path):
    write_study(tmp_path, ["NL", "CODE"], 2, {"logic": 22}, {})
    for run in (tmp_path / "runs").iterdir():
        write_task(run, "logic", 22, 0.0, run.name.partition(".")[0], ties=22)
    report(str(tmp_path), say=lambda line: None)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "Nothing was measured: most questions of all tasks are ties." in markdown
    assert not table(tmp_path, "scores") and not table(tmp_path, "differences")


class _Page(html.parser.HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.images: list[str] = []
        self.fetched: list[str] = []
        self.anchors: set[str] = set()

    def handle_starttag(self, tag, attributes):
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        values = dict(attributes)
        self.anchors |= {values["id"]} if "id" in values else set()
        if tag == "img":
            assert values["alt"]
            self.images.append(values["src"])
        self.fetched += [value for name, value in attributes if name in ("src", "href") and not value.startswith(
            ("data:", "#"))]
        self.fetched += [value[1:] for name, value in attributes if name == "href" and value[1:] not in self.links]

    links: set[str] = set()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_else(one_seed):
    text = (one_seed / "report" / "report.html").read_text()
    page = _Page()
    page.links = set(re.findall(r'id="([^"]+)"', text))
    page.feed(text)
    assert not page.open and not page.fetched and len(page.images) >= 4
    assert all(image.startswith("data:image/svg+xml;base64,") for image in page.images)
    assert "@import" not in text and "url(" not in text and "<script" not in text
    markdown = (one_seed / "report" / "report.md").read_text()
    for name in re.findall(r"!\[.*?\]\((.*?)\)", markdown):
        assert (one_seed / "report" / name).read_bytes().startswith(b"\x89PNG")
        assert (one_seed / "report" / name).with_suffix(".svg").exists()
        assert (one_seed / "report" / name).with_suffix(".pdf").read_bytes().startswith(b"%PDF")


def test_a_sentence_stands_above_each_table(one_seed):
    page = (one_seed / "report" / "report.html").read_text()
    above = re.findall(r'<p class="caption">([^<]*(?:<code>[^<]*</code>[^<]*)*)</p><div class="wide"><table>', page)
    assert len(above) == page.count("<table>") > 5
    assert all(text.endswith(".") and len(text.split()) > 6 for text in above)
    in_latex = (one_seed / "report" / "tables.tex").read_text()
    assert in_latex.count(r"\caption{") == in_latex.count(r"\label{tab:") == len(above)
    assert "−" in page and not re.search(r">-\d", page)  # numbers below 0 have a minus sign


def test_what_says_nothing_is_said_first(tmp_path, capsys):
    write_study(tmp_path, ["NL", "CODE"], 1, {"logic": 5, "mbpp": 4}, {}, sample=True, arrays=TINY, tokens=4096)
    assert cli.main(["report", str(tmp_path)]) == 0
    for first in ((tmp_path / "report" / "report.md").read_text().splitlines()[0],
                  next(line for line in capsys.readouterr().out.splitlines() if line.startswith("Such"))):
        assert "Such models say nothing about reasoning: the models are tiny (2,097,152 parameters" in first
        assert "sample items" in first and "4,096" in first
    page = (tmp_path / "report" / "report.html").read_text()
    assert page.index("say nothing about reasoning") < page.index("<h1>")


def mixed(folder: Path, **settings) -> str:
    """Two runs of which the second was asked otherwise; what the command answers."""
    write_study(folder, ["NL", "CODE"], 1, {"cosqa": 10}, {})
    write_task(folder / "runs" / "CODE.seed0", "cosqa", 10, 0.0, "CODE", settings=settings)
    return str(folder)


@pytest.mark.parametrize("name, value", [("data", "b" * 64), ("template", "paper"), ("few_shot", 3), ("scoring", "sum"),
                                         ("questions", "c" * 64), ("version", 2)])
def test_results_that_must_not_be_mixed_are_refused(tmp_path, capsys, name, value):
    assert cli.main(["report", mixed(tmp_path, **{name: value})]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert f"cosqa: the {name} of NL.seed0 and CODE.seed0 differ" in line and str(value)[:12] in line
    assert not (tmp_path / "report").exists()


def test_samples_and_official_files_are_not_mixed(tmp_path, capsys):
    write_study(tmp_path, ["NL", "CODE"], 1, {"cosqa": 10}, {})
    results = tmp_path / "runs" / "CODE.seed0" / "results"
    shutil.rmtree(results)
    write_task(results.parent, "cosqa", 10, 0.0, "CODE", sample=True)
    assert cli.main(["report", str(tmp_path)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "NL.seed0 was asked the official files and CODE.seed0 was asked the sample items" in line
    assert not (tmp_path / "report").exists()


def test_seeds_that_were_trained_otherwise_are_no_seeds(tmp_path, capsys):
    write_study(tmp_path, ["NL"], 1, {"cosqa": 10}, {})
    write_study(tmp_path, ["NL-x"], 1, {"cosqa": 10}, {}, rates={"NL-x": 0.5})
    (tmp_path / "runs" / "NL-x.seed0").rename(tmp_path / "runs" / "NL.seed1")
    (tmp_path / "study.json").unlink()
    assert cli.main(["report", str(tmp_path)]) == 1
    assert "NL.seed0 and NL.seed1 count as seeds of one arm, NL, but their mixture.code_rate differ (0.0 and 0.5)" \
        in capsys.readouterr().err


def test_other_data_under_the_same_name_is_refused(tmp_path, capsys):
    folder = write_study(tmp_path, ["NL", "CODE"], 1, {"cosqa": 10}, {})
    path = folder / "runs" / "CODE.seed0" / "provenance.json"
    path.write_text(path.read_text().replace("ab" * 32, "ba" * 32))
    assert cli.main(["report", str(tmp_path)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert "NL.seed0 and CODE.seed0 were trained on different data under one name: text.books was abababababab" in line
    assert not (tmp_path / "report").exists()


def test_each_result_says_where_it_comes_from(one_seed):
    rows = table(one_seed, "results")
    assert len(rows) == 6 * len(N)
    row = next(row for row in rows if (row["run"], row["task"]) == ("NN.seed0", "cosqa"))
    assert (row["config_hash"], row["checkpoint_digest"], row["code_commit"], row["scoring"], row["template"]) == (
        "e7a1" * 16, "digest of NN.seed0", "412abbb" * 5, "per_token", "released")
    run = next(row for row in table(one_seed, "provenance") if row["run"] == "NN.seed0")
    assert (run["seed"], run["from"], run["arm_by_ledger"]) == ("0", "NL.seed0", "NN")
    assert json.loads(run["data"]).keys() == {"text.books", "code.github"} and json.loads(run["versions"])["jax"]
    assert json.loads(run["tokens"]) == {"text.books": 420_000_000, "code.github": 0}
    assert run["pretraining_tokens"] == "42000000000"


def test_too_little_held_out_is_noted_beside_the_losses(tmp_path):
    folder = write_study(tmp_path, ["NL", "CODE"], 1, {"cosqa": 10}, {})
    for name in ("NL", "CODE"):
        path = folder / "runs" / f"{name}.seed0" / "provenance.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": ["text: 1 documents <are> held out."]}))
    report(str(folder), say=lambda line: None)
    section = (folder / "report" / "report.md").read_text().split("## Held-out loss")[1].split("\n## ")[0]
    assert "`NL.seed0`, `CODE.seed0`: text: 1 documents" in section
    assert "<are>" not in (folder / "report" / "report.html").read_text()


def without_digests(path: Path) -> str:
    """The text of a result's lines as earlier versions wrote it."""
    return re.sub(r', "digest": "[0-9a-f]{64}"', "", path.read_text())


@pytest.mark.parametrize("spoil, message", [
    (lambda folder: shutil.rmtree(folder), "There is no directory"),
    (lambda folder: [shutil.rmtree(path) for path in folder.glob("runs/*")], "No run in"),
    (lambda folder: (folder / "study.json").write_text("{"), "study.json is not valid JSON"),
    (lambda folder: (folder / "study.json").write_text('{"runs": [{}]}'), "lists no runs"),
    (lambda folder: (folder / "runs/NL.seed0/results/cosqa.json").write_text("{}"),
     "is not the result of an evaluation"),
    (lambda folder: (folder / "runs/NL.seed0/results/cosqa.jsonl").write_text("{}\n"), "its lines do not match"),
    (lambda folder: (path := folder / "runs/NL.seed0/results/cosqa.jsonl").write_text(
        path.read_text().replace('"correct": 1.0', '"correct": 0.0')), "its lines do not match"),
    (lambda folder: (path := folder / "runs/NL.seed0/results/cosqa.jsonl").write_text(
        without_digests(path).replace('"correct": 1.0', '"correct": 0.0')), "its lines do not add up to its accuracy"),
    (lambda folder: (path := folder / "runs/NL.seed0/results/cosqa.jsonl").write_text(without_digests(path).replace(
        '"log_likelihood": -1.0', '"log_likelihood": "low"')), "cosqa.jsonl is damaged: Type"),
    (lambda folder: (path := folder / "runs/NL.seed0/results/cosqa.json").write_text(
        path.read_text().replace('"n": 10', '"n": 9')), "it differs from what was written"),
    (lambda folder: (folder / "runs/NL.seed0/results/cosqa.json").write_text("[" * 100_000), "it is not JSON"),
    (lambda folder: (folder / "study.json").write_text('{"runs": [{"run": "NL.seed0", "seed": "many"}]}'),
     "study.json is damaged: 'seed' is 'many'"),
    (lambda folder: (folder / "study.json").write_text('{"runs": 5}'), "lists no runs"),
])
def test_broken_studies_get_one_line(tmp_path, capsys, spoil, message):
    folder = write_study(tmp_path / "study", ["NL", "CODE"], 1, {"cosqa": 10}, {})
    spoil(folder)
    assert cli.main(["report", str(folder)]) == 1
    [line] = capsys.readouterr().err.strip().splitlines()
    assert message in line and not (folder / "report").exists()


def test_a_study_that_is_not_done_is_reported_as_far_as_it_is(tmp_path):
    folder = write_study(tmp_path, ["NL", "CODE"], 2, {"cosqa": 40}, {})
    shutil.rmtree(folder / "runs" / "CODE.seed1")
    (folder / "runs" / "NL.seed1" / "provenance.json").unlink()
    report(str(folder), say=lambda line: None)
    markdown = (folder / "report" / "report.md").read_text()
    assert "Planned and without results yet: `CODE.seed1`." in markdown
    assert "There is no provenance.json for `NL.seed1`" in markdown
    [row] = table(folder, "differences")
    assert (row["test"], row["first_seeds"], row["second_seeds"]) == ("questions", "1", "2")
    (folder / "report" / "sweep_old.png").write_bytes(b"")
    (folder / "report" / "notes.txt").write_text("mine")
    before = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    report(str(folder), say=lambda line: None)
    after = {path.name: path.read_bytes() for path in (folder / "report").iterdir()}
    assert before.keys() - after.keys() == {"sweep_old.png"}
    assert all(before[name] == content for name, content in after.items())  # the same files give the same report


def test_a_sweep_is_plotted_against_its_rates(tmp_path):
    rates = {"NL": 0.0, "CODE-0.1": 0.1, "CODE-0.25": 0.25, "CODE-0.5": 0.5}
    report(str(write_study(tmp_path, list(rates), 1, {"cosqa": 40}, {}, rates=rates)), say=lambda line: None)
    markdown = (tmp_path / "report" / "report.md").read_text()
    assert "NL at 0, CODE-0.1 at 0.1, CODE-0.25 at 0.25, CODE-0.5 at 0.5" in markdown
    assert (tmp_path / "report" / "sweep_pretraining.svg").exists()
    # None of these rates is the paper's, a third, so that none stands under its name.
    assert "(2.6B)" not in markdown and "paper's" not in markdown


def test_a_folder_of_ordinary_runs_will_do(pretrained, tmp_path, capsys):
    """Trained and evaluated by the commands; arms are told from the ledgers."""
    for run in ("NL", "CODE"):
        shutil.copytree(pretrained / run, tmp_path / f"run_{run.lower()}")
        assert cli.main(["eval", "--gin_file=gin/eval.gin", f"--gin.CHECKPOINT_PATH={tmp_path}/run_{run.lower()}",
                         "--gin.TASKS=['logic', 'cosqa']"]) == 0
    capsys.readouterr()
    assert cli.main(["report", str(tmp_path)]) == 0, capsys.readouterr().err
    assert "Such models say nothing about reasoning" in capsys.readouterr().out
    rows = table(tmp_path, "scores")
    assert [(row["arm"], row["task"], row["sample"]) for row in rows] == [
        (arm, task, "True") for arm in ("CODE", "NL") for task in ("logic", "cosqa")]
    for row in rows:
        lines = (tmp_path / f"run_{row['arm'].lower()}" / "results" / f"{row['task']}_sample.jsonl").read_text()
        right = [json.loads(line)["correct"] for line in lines.splitlines()[1:]]
        assert float(row["value"]) == pytest.approx(100 * sum(right) / len(right))
    run = next(row for row in table(tmp_path, "provenance") if row["run"] == "run_code")
    assert run["arm_by_ledger"] == "CODE" and run["step"] == "4" and int(run["parameters"]) > 8192 * 32
    assert len(run["checkpoint_digest"]) == len(run["order"]) == len(run["config_hash"]) == 64
    losses = [row for row in table(tmp_path, "losses") if row["run"] == "run_code" and row["pool"] == "code"]
    assert [row["step"] for row in losses] == ["0", "4"] and float(losses[1]["tokens"]) == 4 * 8 * 32
    assert (tmp_path / "report/mix.png").exists()


def test_nothing_that_is_data_becomes_a_page():
    text = 'run <script src="x"></script> & <!-- x --> `<code>`, p < 0.05'
    blocks = [Heading(2, text), Text(text), Notice(text), Items([text]), Table(text, [text], [[text]])]
    for written in (markdown(text, blocks), page(text, blocks)):
        outside = re.sub(r"<style>.*?</style>|`[^`]+`|<code>&lt;code&gt;</code>", "", written, flags=re.DOTALL)
        assert not re.search(r"(?<!\\)<(script|!--|code)", outside)
    assert r"run \<script src=" in markdown(text, blocks) and "p < 0.05" in markdown(text, blocks)
